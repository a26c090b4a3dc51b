"""Keeps a router informed: which replicas Serve has, and what they report of themselves.

Serve's request routers say which replicas there are (`router/replica_registry.py`). The ingress subscribes to each of
them, by a Serve call that goes to that replica, and its reports come over ZeroMQ from then on. A replica that falls
silent, or whose reports have a gap, is asked again.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Coroutine, Mapping
from typing import Any

import msgspec
from ray.serve.handle import DeploymentHandle

from ..cluster.messages import SubscribeCall
from ..cluster.replica_report import ReplicaReport
from . import replica_registry
from .report_receiver import ASK_SECONDS, SILENCE_SECONDS, ReportReceiver
from .router import Router

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
CALL_SECONDS = 10.0
"""A replica may take so long to answer."""


class FleetWatch:
    """Use it on the event loop of the router."""

    def __init__(self, router: Router, handles: Mapping[str, DeploymentHandle], host: str) -> None:
        """Watch the replicas behind `handles`, by model; their reports come to `host`."""
        self._router = router
        self._handles = handles
        self._model_of = {handle.deployment_name: model for model, handle in handles.items()}
        self._receiver = ReportReceiver(host, router.index, self._on_report, self._subscribe)
        self._asked: dict[str, float] = {}
        self._calls: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Watch until cancelled."""
        self._receiver.start()
        loop = asyncio.get_running_loop()

        def on_replicas(deployment: str, replicas: tuple[str, ...]) -> None:
            loop.call_soon_threadsafe(self._set_replicas, deployment, replicas)

        stop = replica_registry.watch(on_replicas)
        try:
            while True:
                for model, handle in self._handles.items():
                    if not self._router.fleet.replicas(model):
                        # Serve learns the replicas of a deployment with the first call to it.
                        self._start(self._wake(handle), model)
                    for replica in self._router.fleet.replicas(model):
                        if self._receiver.silence(replica) > SILENCE_SECONDS:
                            self._subscribe(model, replica)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            stop()
            for call in self._calls:
                call.cancel()
            self._receiver.close()
            await asyncio.gather(*self._calls, return_exceptions=True)

    # --- which replicas there are ---------------------------------------------------------------------------------

    def _set_replicas(self, deployment: str, replicas: tuple[str, ...]) -> None:
        model = self._model_of.get(deployment)
        if model is None:
            return
        new, gone = self._router.set_replicas(model, replicas)
        for replica in gone:
            self._receiver.forget(replica)
            self._asked.pop(replica, None)
        for replica in new:
            self._subscribe(model, replica)

    async def _wake(self, handle: DeploymentHandle) -> None:
        await handle.broadcast("check_health").results_async(timeout_s=CALL_SECONDS, return_exceptions=True)

    # --- reports --------------------------------------------------------------------------------------------------

    def _on_report(self, report: ReplicaReport) -> None:
        self._router.fleet.report(report.replica, report.load, report.accepted)
        if self._router.fleet.row(report.replica) is None:  # it finishes its last requests
            self._receiver.forget(report.replica)

    def _subscribe(self, model: str, replica: str) -> None:
        """Ask a replica for its reports, a snapshot first."""
        now = asyncio.get_running_loop().time()
        if model not in self._handles or replica not in self._router.fleet.replicas(model):
            return
        if now - self._asked.get(replica, -ASK_SECONDS) < ASK_SECONDS:
            return
        self._asked[replica] = now
        self._start(self._call(self._handles[model], replica), replica)

    async def _call(self, handle: DeploymentHandle, replica: str) -> None:
        payload = msgspec.msgpack.encode(SubscribeCall(self._receiver.endpoint, replica))
        async with asyncio.timeout(CALL_SECONDS):
            await contextvars.Context().run(handle.subscribe.remote, payload)

    def _start(self, call: Coroutine[Any, Any, None], what: str) -> None:
        """Run `call` in a task of its own, unless one about the same is running."""
        if any(task.get_name() == what for task in self._calls):
            call.close()
            return
        task = asyncio.create_task(_guarded(call, what), name=what)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)


async def _guarded(call: Coroutine[Any, Any, None], what: str) -> None:
    try:
        await call
    except Exception as error:  # it is tried again as long as the replica is silent
        logger.warning("%s does not answer: %s", what, error)
