"""The ingress as a Ray Serve deployment: wires the HTTP face to the replicas of the served models."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from ..cluster.cpu_affinity import keep_off_shards, plan_this_node
from ..cluster.messages import ModelCard
from ..cluster.router_config import RouterConfig
from .api import build_app
from .classifier import Classifier
from .cluster_metrics import ClusterMetrics
from .fleet_watch import FleetWatch
from .metrics import IngressMetrics
from .replica_client import ReplicaClient
from .router import Router
from .token_receiver import TokenReceiver

_PACKAGE = __name__.partition(".")[0]


@serve.ingress()
class Ingress:
    """One ingress replica. Deploy it with `serve.deployment(Ingress).options(...).bind(...)`."""

    def __init__(
        self,
        cards: list[ModelCard],
        handles: list[DeploymentHandle],
        routing: RouterConfig,
        classifier: bytes | None,
        max_body_bytes: int,
        cpu_shards: int,
        *,
        chooses_replicas: bool = True,
    ) -> None:
        """Serve the models of `cards`; `handles[i]` reaches the replicas of `cards[i]`.

        Args:
            cards: the served models.
            handles: of deployments whose class has `generate(call: bytes) -> bytes`, `subscribe(call: bytes)` and
                `check_health()`.
            routing: how models and replicas are chosen.
            classifier: the content of the file `routing.classifier`.
            max_body_bytes: larger request bodies are refused.
            cpu_shards: that compute on this node, whose CPUs are to be left to them; 0: need not be.
            chooses_replicas: False leaves the replica to the request router of Serve.
        """
        if cpu_shards:
            keep_off_shards(plan_this_node(shards=cpu_shards))
        _log_like_serve()
        self._cards = cards
        self._handles = {card.name: handle for card, handle in zip(cards, handles, strict=True)}
        self._max_body_bytes = max_body_bytes
        host = ray.util.get_node_ip_address()
        self._receiver = TokenReceiver(host)
        self._router = Router(cards, routing, Classifier.from_json(classifier) if classifier else None)
        self._watch = FleetWatch(self._router, self._handles, host) if chooses_replicas else None
        self._cluster_metrics = ClusterMetrics()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Serve asks for it when the replica starts."""
        self._metrics = IngressMetrics(serve.get_replica_context().replica_id.unique_id)
        return build_app(
            self._cards,
            ReplicaClient(self._handles, self._receiver, self._router),
            self._router,
            max_body_bytes=self._max_body_bytes,
            metrics=self._metrics,
            metrics_text=self._cluster_metrics.text,
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self._receiver.start()
        tasks = [asyncio.create_task(self._every_second())]
        if self._watch is not None:
            tasks.append(asyncio.create_task(self._watch.run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._receiver.close()
            await self._cluster_metrics.close()

    async def _every_second(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._metrics.publish()
            # Every request leaves tasks and frames behind that refer to one another, Serve's above all. Python looks
            # for such garbage when there are tens of thousands of objects of it, and then all streams stand still for
            # a tenth of a second; a second's worth is little. What was there at the start is frozen by Serve.
            gc.collect()


def _log_like_serve() -> None:
    """Let this package's messages go where Serve's own go: the replica's log file."""
    serve_logger, ours = logging.getLogger("ray.serve"), logging.getLogger(_PACKAGE)
    ours.setLevel(serve_logger.level)
    ours.handlers = list(serve_logger.handlers)
    ours.propagate = False
