"""The books that replica choice needs: how many tokens of work each replica has been given and has not finished."""

from __future__ import annotations

import msgspec

from .policy import Candidate


class _Sampling(msgspec.Struct):
    max_tokens: int = 0


class _Request(msgspec.Struct):
    prompt: msgspec.Raw
    sampling: _Sampling


class _CallSize(msgspec.Struct):
    """The part of a `GenerateCall` that tells its size; the rest is skipped without being decoded."""

    request: _Request


_decoder = msgspec.msgpack.Decoder(_CallSize)


def call_tokens(call: bytes) -> int:
    """Prompt tokens plus `max_tokens` of an encoded `GenerateCall`: the most tokens that it will occupy."""
    request = _decoder.decode(call).request
    return _array_length(bytes(memoryview(request.prompt)[:5])) + request.sampling.max_tokens


def _array_length(head: bytes) -> int:
    """Elements of a msgpack array, from its first bytes (msgpack specification, "Array format family")."""
    if head[0] & 0xF0 == 0x90:
        return head[0] & 0x0F
    return int.from_bytes(head[1:3] if head[0] == 0xDC else head[1:5], "big")


class LoadBook:
    """Outstanding tokens of every replica, by request."""

    def __init__(self) -> None:
        self._placed: dict[str, tuple[str, int]] = {}
        self._outstanding: dict[str, int] = {}
        self._last_routed: dict[str, int] = {}
        self._routed = 0

    def place(self, request: str, replica: str, tokens: int) -> None:
        """Count `request` at `replica`, and no longer where it was counted before."""
        self.remove(request)
        self._placed[request] = (replica, tokens)
        self._outstanding[replica] = self._outstanding.get(replica, 0) + tokens
        self._routed += 1
        self._last_routed[replica] = self._routed

    def remove(self, request: str, replica: str | None = None) -> None:
        """Forget `request`; with `replica`, only if it is counted there."""
        placed = self._placed.get(request)
        if placed is None or (replica is not None and placed[0] != replica):
            return
        del self._placed[request]
        self._outstanding[placed[0]] -= placed[1]

    def candidate(self, replica: str) -> Candidate:
        """What is known of `replica`."""
        return Candidate(replica, self._outstanding.get(replica, 0), self._last_routed.get(replica, 0))

    def keep(self, replicas: set[str]) -> None:
        """Drop replicas that no longer exist and have nothing outstanding."""
        for gone in [r for r in self._last_routed if r not in replicas and not self._outstanding.get(r)]:
            self._last_routed.pop(gone)
            self._outstanding.pop(gone, None)
