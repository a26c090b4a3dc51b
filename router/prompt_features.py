"""What of a prompt tells how hard it is, as numbers: cheap enough for every request, and the same in every process.

Two kinds. *Counts* of what stands in the text (`COUNTS`), as log(1 + n). *Phrases*: single words, pairs and triples of
neighbours, each a number of 32 bits. A word is a run of letters in lower case; a run of digits, written as so many
zeros, so that "12 + 345" and "67 + 890" have the same phrases; or any other visible character. Two marks, begin
(U+0002) and end (U+0003), count as words but are no phrase alone. A phrase's number is CRC-32 (zlib's) of its words'
UTF-8, each with a line end.

Only the first and the last `EDGE` characters of the last message are looked at, and of them the first and the last
`EDGE_WORDS` words make phrases, so that a long message takes no longer.
"""

from __future__ import annotations

import math
import re
from zlib import crc32

import msgspec

VERSION = 1
"""Of the features; a classifier that was fitted on others must not be used."""
EDGE = 256
EDGE_WORDS = 32

COUNTS = (
    "prompt_tokens",  # of the whole prompt
    "chars",
    "messages",
    "message_chars",  # of the last message alone
    "lines",
    "words",
    "letters",
    "digits",
    "numbers",
    "distinct_digits",
    "longest_number",
    "shortest_number",
    "operators",
    "brackets",
    "commas",
    "stops",
    "questions",
    "code_signs",
    "non_ascii",
)
SIZES = COUNTS[: COUNTS.index("message_chars") + 1]
"""Those that say how much there is, whatever it is about."""

_CLASSES = {
    b"a": b"abcdefghijklmnopqrstuvwxyz",
    b"0": b"0123456789",
    b"+": b"+-*/=<>^%",
    b"(": b"()[]{}",
    b",": b",;:",
    b".": b".!",
    b"?": b"?",
    b"_": b"_`$#\\|&~@",
    b"\n": b"\n",
    b"\x80": bytes(range(0xC0, 0x100)),  # the first byte of a character beyond ASCII
}
_CLASS = bytes(next((name[0] for name, members in _CLASSES.items() if byte in members), 0x20) for byte in range(256))
_ZEROS = bytes(0x30 if 0x30 <= byte <= 0x39 else byte for byte in range(256))
_NO_DIGITS = bytes(byte for byte in range(256) if not 0x30 <= byte <= 0x39)
_WORDS = re.compile(rb"[a-z\x80-\xff]+|0+|[^\sa-z0\x80-\xff]")
_BEGIN, _END = b"\x02", b"\x03"


class PromptFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What rules and the classifier may know of a request."""

    text: str
    """The last message of the user, or the prompt."""
    chars: int
    """Of all messages."""
    messages: int = 1
    """All, system prompt and answers among them."""
    prompt_tokens: int
    tools: bool = False
    """The conversation has calls of tools or their results, or offers tools."""
    json_schema: bool = False
    """The answer has to be JSON."""
    latency_class: str = "default"


class Features(msgspec.Struct, frozen=True):
    """Of one prompt."""

    counts: list[float]
    """log(1 + n), in the order of `COUNTS`."""
    phrases: list[int]
    """Without repetition, in no order."""


def prompt_features(facts: PromptFacts) -> Features:
    """The features of a prompt; 15 to 75 µs (`deploy/bench/classifier.py`)."""
    text = facts.text if len(facts.text) <= 2 * EDGE else f"{facts.text[:EDGE]}\n{facts.text[-EDGE:]}"
    lowered = text.lower().encode("utf-8", "replace")
    words = _WORDS.findall(lowered.translate(_ZEROS))
    classes = lowered.translate(_CLASS)
    count = classes.count
    numbers = [len(word) for word in words if word[0] == 0x30]
    counts = (
        facts.prompt_tokens,
        facts.chars,
        facts.messages,
        len(facts.text),
        count(b"\n") + 1,
        len(words),
        count(b"a"),
        count(b"0"),
        len(numbers),
        len(set(lowered.translate(None, _NO_DIGITS))),
        max(numbers, default=0),
        min(numbers, default=0),
        count(b"+"),
        count(b"("),
        count(b","),
        count(b"."),
        count(b"?"),
        count(b"_"),
        count(b"\x80"),
    )
    if len(words) > 2 * EDGE_WORDS:
        words = words[:EDGE_WORDS] + words[-EDGE_WORDS:]
    return Features(list(map(math.log1p, counts)), _phrases(words))


def _phrases(words: list[bytes]) -> list[int]:
    """Numbers of the distinct phrases of one to three words."""
    marked = b"\n".join([_BEGIN, *words, _END, b""]).splitlines(keepends=True)  # no word has a line end in it
    singles = list(map(crc32, marked))
    pairs = list(map(crc32, marked[1:], singles))
    triples = map(crc32, marked[2:], pairs)
    return list({*singles[1:-1], *pairs, *triples})
