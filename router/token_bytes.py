"""The bytes that each token stands for, found out from the tokenizer's own decoder.

A text that is decoded token by token has to be cut at byte granularity: one character of four bytes may come as four
tokens. Decoding windows of tokens to *text* and comparing lengths hides that behind U+FFFD characters, changes
what was already sent when a byte-fallback group turns out invalid, and cannot tell an unfinished character from a
broken one. Bytes can simply be joined.

    byte-level BPE (Llama 3, Qwen …)      Ġworld      → b" world"           GPT-2's byte alphabet
    SentencePiece (Llama 2, Gemma …)      ▁world      → b" world"           the decoder itself, in context
                                          <0xF0>      → b"\\xf0"             byte fallback
    added tokens                          <|im_end|>  → b"<|im_end|>"
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_FALLBACK = re.compile(r"<0x([89A-Fa-f][0-9A-Fa-f])>")
_ANCHOR = "a"
"""A piece that every decoder passes through unchanged, put before another piece to see it in the middle of a text."""


class TokenBytes:
    """Maps token ids to bytes; computed on first use and kept."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._decoder = backend.decoder
        kinds = _component_types(json.loads(self._decoder.__getstate__())) if self._decoder is not None else set()
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._inner: dict[int, bytes] = {}
        self._first: dict[int, bytes] = {}
        self.texts: dict[int, str | None] = {}
        """Text of the tokens that `inner` was asked for; None for one that is not whole characters."""

    def inner(self, token: int) -> bytes:
        """Bytes of `token` after other text; empty for an id without a token."""
        if (found := self._inner.get(token)) is None:
            found = self._inner[token] = self._bytes(token, first=False)
            try:
                self.texts[token] = found.decode()
            except UnicodeDecodeError:
                self.texts[token] = None
        return found

    def first(self, token: int) -> bytes:
        """Bytes of `token` at the beginning of a text, where some decoders drop a leading space."""
        if (found := self._first.get(token)) is None:
            found = self._first[token] = self._bytes(token, first=True)
        return found

    def _bytes(self, token: int, *, first: bool) -> bytes:
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
            except KeyError:  # an added token, stored as plain text
                return piece.encode()
        if self._byte_fallback and (match := _BYTE_FALLBACK.fullmatch(piece)):
            return bytes.fromhex(match[1])  # part of a character; ASCII goes through the decoder, which may strip it
        if self._decoder is None:  # `tokenizers` joins such tokens with spaces
            return piece.encode() if first else b" " + piece.encode()
        if first:
            return self._decoder.decode([piece]).encode()
        return self._decoder.decode([_ANCHOR, piece])[len(_ANCHOR) :].encode()


def _component_types(decoder: dict[str, Any]) -> set[str]:
    """Types of a serialised decoder and of the ones inside a sequence."""
    found = {decoder["type"]}
    for part in decoder.get("decoders", []):
        found |= _component_types(part)
    return found


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable Latin-1 stands for itself, the other 68 bytes begin at U+0100.

    Source: `bytes_to_unicode` of GPT-2's encoder.py.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
