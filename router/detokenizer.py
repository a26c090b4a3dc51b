"""Incremental detokenising: from tokens to text that is never taken back, and stop strings found in it.

The text of a request is the same however its tokens were grouped on the way: streamed pieces joined are the
non-streamed answer.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Turns the tokens of one answer into text, one at a time.

    A character comes out when its last byte has arrived. Bytes that cannot be part of a character become U+FFFD; an
    unfinished character at the end of the answer never appears.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        """Begin an answer to `prompt`, whose tokens only decide whether the answer begins in the middle of a text."""
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._at_start = all(token in tokenizer.special_ids for token in prompt)
        self._utf8 = _Utf8Decoder("replace")
        self._between_characters = True

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty in the middle of a character."""
        if token in self._skipped:
            return ""
        if self._at_start:
            self._at_start = False
            return self._decode(self._token_bytes.first(token))
        # Most tokens are whole characters, and then their text is known from the last time.
        if self._between_characters and (text := self._token_bytes.texts.get(token)) is not None:
            return text
        return self._decode(self._token_bytes.inner(token))

    def _decode(self, data: bytes) -> str:
        text = self._utf8.decode(data)
        self._between_characters = not self._utf8.getstate()[0]
        return text


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces.

    Text is held back only while it is the beginning of a stop string. Of several stop strings the one that is complete
    first counts, and of those that end together the longest, so that the pieces' sizes do not matter.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """Look for `stops`; with `include`, a found one stays in the text."""
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._include = include
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """The text that can be shown after `text` arrived. Nothing may be pushed after a stop string was found."""
        if not self._stops:
            return text
        text = self._held + text
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            end, start, self.found = min(matches)
            self._held = ""
            return text[: end if self._include else start]
        kept = self._possible_start(text)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """The text held back, at the end of an answer without a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Index in `text` from which on a stop string may have begun; its length if none has."""
        for index in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[index] in self._first_characters:
                tail = text[index:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return index
        return len(text)
