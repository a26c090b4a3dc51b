"""Which replica a Serve call was meant for."""

from __future__ import annotations

import msgspec


class _Target(msgspec.Struct):
    """The part of a `GenerateCall` or `SubscribeCall` that matters here; the rest is skipped without being decoded."""

    target: str = ""


_decode = msgspec.msgpack.Decoder(_Target).decode


def call_target(call: object) -> str:
    """The replica that an encoded call names; "" for any, and for calls of another form."""
    return _decode(call).target if isinstance(call, bytes) else ""
