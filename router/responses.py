"""OpenAI's response bodies and stream chunks, with vLLM's `stop_reason`, `token_ids` and `prompt_token_ids`.

A stream sends thousands of chunks that differ only in their text, so the JSON around the text is encoded once per
choice and the text put in between.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .generation import Choice, Delta
from .logprobs import chat_logprobs, completion_logprobs
from .tokenizer import Tokenizer

_encode = msgspec.json.encode
STREAM_END = b"data: [DONE]\n\n"


def sse_event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data) + b"\n\n"


@dataclass
class ResponseOptions:
    """What the client wants to see besides the text."""

    id: str
    created: int
    model: str
    logprobs: int | None = None
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    prompts: list[list[int]] = field(default_factory=list)
    """Token ids of each prompt."""
    echoes: list[str] = field(default_factory=list)
    """Text put before the answers to each prompt; empty for none."""
    n: int = 1
    """Choices per prompt: choice i answers prompt i // n."""


class ResponseFormat(ABC):
    """Builds the bodies of one endpoint for one request."""

    object: str
    chunk_object: str

    def __init__(self, options: ResponseOptions, tokenizer: Tokenizer) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def body(self, choices: Sequence[Choice], deltas: Sequence[Delta]) -> bytes:
        """The whole response: `deltas[i]` is everything that `choices[i]` generated."""
        head = self._head(self.object) | self._prompt_fields()
        head["choices"] = [self._choice(*pair) for pair in zip(choices, deltas, strict=True)]
        head["usage"] = self.usage(choices)
        return _encode(head)

    def chunk(self, choice: Choice, delta: Delta, choices: Sequence[Choice]) -> bytes:
        """The event that adds `delta` to `choice`; empty if there is nothing to tell yet."""
        options = self.options
        shows_tokens = bool(delta.tokens) and (options.return_token_ids or delta.chances)
        if delta.finish_reason is None and not shows_tokens:
            if not delta.text:
                return b""
            if not options.continuous_usage:
                before, after = self._frames.get(choice.index) or self._frame(choice)
                return before + _encode(delta.text) + after
        return sse_event(self._chunk(choice, delta, choices))

    def opening(self, choice: Choice) -> bytes:
        """Events that come before a choice's first delta."""
        return b""

    def closing(self, choices: Sequence[Choice]) -> bytes:
        """Events after the last delta: the usage if asked for, and the end mark."""
        if not self.options.include_usage:
            return STREAM_END
        head = self._head(self.chunk_object)
        head["choices"] = []
        head["usage"] = self.usage(choices)
        return sse_event(head) + STREAM_END

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Token counts; a prompt with several choices counts once."""
        prompt = sum(map(len, self.options.prompts))
        completion = sum(choice.completion_tokens for choice in choices)
        cached = sum(choice.cached_tokens for choice in choices[:: self.options.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _frame(self, choice: Choice) -> tuple[bytes, bytes]:
        """The bytes around the text in a chunk that carries nothing else."""
        mark = secrets.token_hex(16)
        event = sse_event(self._chunk(choice, Delta(text=mark), ()))
        before, after = event.split(_encode(mark))
        self._frames[choice.index] = before, after
        return before, after

    def _chunk(self, choice: Choice, delta: Delta, choices: Sequence[Choice]) -> dict[str, Any]:
        head = self._head(self.chunk_object)
        head["choices"] = [self._chunk_choice(choice, delta)]
        if self.options.continuous_usage and choices:
            head["usage"] = self.usage(choices)
        elif self.options.include_usage:
            head["usage"] = None
        return head

    def _head(self, kind: str) -> dict[str, Any]:
        options = self.options
        return {
            "id": options.id,
            "object": kind,
            "created": options.created,
            "model": options.model,
            "system_fingerprint": None,
        }

    def _ending(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """The fields that every choice ends with."""
        ending: dict[str, Any] = {"finish_reason": delta.finish_reason}
        if delta.finish_reason is not None:
            ending["stop_reason"] = choice.stop_reason
        if self.options.return_token_ids:
            ending["token_ids"] = delta.tokens
        return ending

    def _prompt_fields(self) -> dict[str, Any]:
        """What the endpoint reports of the prompt for the response as a whole."""
        return {}

    @abstractmethod
    def _choice(self, choice: Choice, delta: Delta) -> dict[str, Any]: ...

    @abstractmethod
    def _chunk_choice(self, choice: Choice, delta: Delta) -> dict[str, Any]: ...


class ChatFormat(ResponseFormat):
    """`/v1/chat/completions`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, choice: Choice) -> bytes:
        """The chunk that names the role."""
        head = self._head(self.chunk_object)
        delta = {"role": "assistant", "content": ""}
        head["choices"] = [{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]
        if self.options.include_usage:
            head["usage"] = None
        return sse_event(head | self._prompt_fields())

    def _choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(delta),
            **self._ending(choice, delta),
        }

    def _chunk_choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text or delta.finish_reason is None else {}
        return {
            "index": choice.index,
            "delta": content,
            "logprobs": self._logprobs(delta),
            **self._ending(choice, delta),
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self.options.logprobs is None:
            return None
        return chat_logprobs(delta.chances, self.options.logprobs, self.tokenizer) if delta.chances else None

    def _prompt_fields(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.options.prompts[0]} if self.options.return_token_ids else {}


class CompletionFormat(ResponseFormat):
    """`/v1/completions`."""

    object = "text_completion"
    chunk_object = "text_completion"

    def opening(self, choice: Choice) -> bytes:
        """The prompt, if it is to be echoed or its token ids are wanted."""
        echo = self._echo(choice)
        if not echo and not self.options.return_token_ids:
            return b""
        head = self._chunk(choice, Delta(text=echo), ())
        head["choices"][0].update(self._prompt_token_ids(choice))
        return sse_event(head)

    def _choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": self._echo(choice) + delta.text,
            "logprobs": self._logprobs(choice, delta),
            **self._ending(choice, delta),
            **self._prompt_token_ids(choice),
        }

    def _chunk_choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": delta.text,
            "logprobs": self._logprobs(choice, delta),
            **self._ending(choice, delta),
        }

    def _echo(self, choice: Choice) -> str:
        return self.options.echoes[choice.index // self.options.n] if self.options.echoes else ""

    def _logprobs(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        if self.options.logprobs is None or not delta.chances:
            return None
        return completion_logprobs(delta.chances, self.options.logprobs, self.tokenizer)

    def _prompt_token_ids(self, choice: Choice) -> dict[str, Any]:
        if not self.options.return_token_ids:
            return {}
        return {"prompt_token_ids": self.options.prompts[choice.index // self.options.n]}
