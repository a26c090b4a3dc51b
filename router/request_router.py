"""Ray Serve's side of replica choice: asks a policy, and keeps the books that the policy needs.

Serve creates one router per handle, that is, one per model in every ingress process; what other ingresses send to a
replica is not seen here.
"""

from __future__ import annotations

import asyncio
import os

import msgspec
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .policy import Candidate, fewest_outstanding_tokens


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


class FewestOutstandingTokens(RequestRouter):
    """Sends each request to the replica with the fewest outstanding tokens."""

    def initialize_state(self) -> None:
        """Begin with empty books. Serve calls this once."""
        self._book = LoadBook()
        self._salt = f"{os.uname().nodename}/{os.getpid()}"

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in the order of preference, each a rank of its own: Serve goes on to the next if one is full."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._book.keep(set(by_name))
        ranked = fewest_outstanding_tokens(map(self._book.candidate, by_name), self._salt)
        if pending_request is not None and ranked:
            # Wait between rounds if every replica is full.
            pending_request.routing_context.should_backoff = True
            self._reserve(pending_request, ranked[0])
        return [[by_name[name]] for name in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """The replica has accepted: count the request there, whatever was planned."""
        request = pending_request.metadata.internal_request_id
        self._book.place(request, replica_id.unique_id, self._tokens(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The control call has ended."""
        self._book.remove(internal_request_id, replica_id.unique_id)

    def _reserve(self, pending_request: PendingRequest, replica: str) -> None:
        """Count the request at once, so that requests of the same moment do not all choose the same replica."""
        request = pending_request.metadata.internal_request_id
        self._book.place(request, replica, self._tokens(pending_request))

        def undo_if_cancelled(routing: asyncio.Future[RunningReplica]) -> None:
            if routing.cancelled():
                self._book.remove(request)

        pending_request.future.add_done_callback(undo_if_cancelled)

    @staticmethod
    def _tokens(pending_request: PendingRequest) -> int:
        """Size of a call to `generate`; 0 for other methods, whose argument is not an encoded `GenerateCall`."""
        call = pending_request.args[0] if pending_request.args else None
        return call_tokens(call) if isinstance(call, bytes) else 0
