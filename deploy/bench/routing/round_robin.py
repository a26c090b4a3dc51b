"""The plainest baseline. Serve pickles this module by value, so it holds the router class and nothing else."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class RoundRobin(RequestRouter):
    """Sends each request to the replica after the last request's, in the order of their names."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Begin with the first replica. Serve calls this once; there is nothing to configure."""
        self._turn = 0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in the order of preference, each a rank of its own."""
        if not candidate_replicas:
            return []
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # wait between rounds if every replica is full
        ring = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        first = self._turn % len(ring)
        self._turn += 1
        return [[replica] for replica in ring[first:] + ring[:first]]
