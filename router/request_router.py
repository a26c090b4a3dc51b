"""Ray Serve's side of replica choice: asks a policy, and keeps the books that the policy needs.

Serve creates one router per handle, that is, one per model in every ingress process; what other ingresses send to a
replica is not seen here. Serve pickles this module by value, so it holds the router class and nothing else.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .load_book import LoadBook, call_tokens
from .policy import fewest_outstanding_tokens


class FewestOutstandingTokens(RequestRouter):
    """Sends each request to the replica with the fewest outstanding tokens."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Begin with empty books. Serve calls this once; there is nothing to configure."""
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
