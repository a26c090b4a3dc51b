"""A call's prompt as a text, for routers that compare texts: one character per token."""

from __future__ import annotations

import msgspec

_SURROGATES = 0xD800
_SURROGATE_COUNT = 0x800
"""Code points that are no characters; larger ids move up by so many."""


class _Request(msgspec.Struct):
    prompt: list[int]


class _CallPrompt(msgspec.Struct):
    """The part of a `GenerateCall` that holds the prompt; the rest is skipped without being decoded."""

    request: _Request


_decoder = msgspec.msgpack.Decoder(_CallPrompt)


def prompt_text(call: bytes) -> str:
    """The prompt of an encoded `GenerateCall`: prompts share so many first tokens as their texts share characters."""
    prompt = _decoder.decode(call).request.prompt
    if max(prompt, default=0) >= _SURROGATES:
        prompt = [token if token < _SURROGATES else token + _SURROGATE_COUNT for token in prompt]
    return "".join(map(chr, prompt))
