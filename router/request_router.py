"""Ray Serve's side of replica choice: sends every call to the replica that the ingress has chosen for it.

The ingress decides over all models at once (`router/policy.py`), while Serve has one request router per model; this
one carries the decision out, and tells the ingress which replicas there are. Serve pickles this module by value, so it
holds the router class and nothing else.
"""

from __future__ import annotations

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from . import replica_registry
from .call_target import call_target


class ChosenReplica(RequestRouter):
    """Puts the replica that a call names first. Without one, or if it is gone or full, any other may take the call."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's replicas of this deployment have changed."""
        super().update_replicas(replicas)
        names = tuple(replica.replica_id.unique_id for replica in self.curr_replicas.values())
        replica_registry.announce(self._deployment_id.name, names)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The chosen replica, then all others in random order, each a rank of its own: Serve goes on to the next if one
        is full."""
        if pending_request is None:
            return [[replica] for replica in candidate_replicas]
        pending_request.routing_context.should_backoff = True  # wait between rounds if every replica is full
        target = call_target(pending_request.args[0] if pending_request.args else None)
        others = [replica for replica in candidate_replicas if replica.replica_id.unique_id != target]
        random.shuffle(others)
        chosen = [replica for replica in candidate_replicas if replica.replica_id.unique_id == target]
        return [[replica] for replica in chosen + others]
