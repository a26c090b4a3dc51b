"""An ingress hears of every replica that Serve has, and asks again whoever falls silent."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from routing_fleet import card, load

from raytroupe.actors.load_reporter import LoadReporter
from raytroupe.cluster.block_pool import BlockPool
from raytroupe.cluster.messages import SubscribeCall
from raytroupe.cluster.replica_report import ReplicaLoad
from raytroupe.router import fleet_watch, replica_registry, report_receiver
from raytroupe.router.fleet_watch import FleetWatch
from raytroupe.router.router import Router

SILENCE = 0.08
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def quickly(monkeypatch) -> None:
    monkeypatch.setattr(fleet_watch, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(fleet_watch, "SILENCE_SECONDS", SILENCE)
    for module in (fleet_watch, report_receiver):
        monkeypatch.setattr(module, "ASK_SECONDS", 0.02)


class Replica:
    """A cache with its reporter."""

    def __init__(self, model: str, name: str) -> None:
        self.pool = BlockPool(33)
        self.load: ReplicaLoad = load(running=1)
        self.reporter = LoadReporter(model, name, self.pool, lambda: self.load, interval_s=0)
        self.subscribed = 0

    def cache(self, *contents: int) -> None:
        """Hold these contents for a moment."""
        blocks = self.pool.allocate(len(contents))
        assert blocks is not None
        for block, content in zip(blocks, contents, strict=True):
            self.pool.register(block, content.to_bytes(16, "little"))
        self.pool.release(blocks)


class Deployment:
    """Stands for a Serve handle: its calls reach the replica that they name, or any other one."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.deployment_name = f"{model}-{next(NUMBERS)}"
        self.replicas: dict[str, Replica] = {}
        self.subscribe = self
        self.failures: list[Exception] = []
        """Raised by the next subscriptions."""
        self.asleep: list[Exception] = []
        """Raised by the next calls that would wake Serve."""
        self.hangs = False
        self.calls: list[str] = []
        self.woken = 0

    async def remote(self, payload: bytes) -> None:
        call = msgspec.msgpack.decode(payload, type=SubscribeCall)
        self.calls.append(call.target)
        if self.hangs:
            await asyncio.Event().wait()
        if self.failures:
            raise self.failures.pop(0)
        replica = self.replicas.get(call.target) or next(iter(self.replicas.values()))
        replica.subscribed += 1
        replica.reporter.subscribe(call.reports_to)

    def broadcast(self, method: str) -> Deployment:
        assert method == "check_health"
        self.woken += 1
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[None]:
        assert return_exceptions
        if self.asleep:
            raise self.asleep.pop(0)
        return []

    async def announce(self, *names: str) -> None:
        """What Serve's router thread does."""
        for name in names:
            self.replicas.setdefault(name, Replica(self.model, name))
        await asyncio.to_thread(replica_registry.announce, self.deployment_name, names)


@pytest.fixture
def router() -> Router:
    return Router([card("large"), card("small")])


@pytest.fixture
async def large() -> AsyncIterator[Deployment]:
    deployment = Deployment("large")
    yield deployment
    for replica in deployment.replicas.values():
        replica.reporter.close()


@asynccontextmanager
async def watching(router: Router, *deployments: Deployment) -> AsyncIterator[FleetWatch]:
    """Runs a watch, and proves that nothing is left of it."""
    others = asyncio.all_tasks()
    handles: Any = {deployment.model: deployment for deployment in deployments}
    watch = FleetWatch(router, handles, "127.0.0.1")
    running = asyncio.create_task(watch.run())
    try:
        await asyncio.sleep(0)
        yield watch
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert asyncio.all_tasks() == others
    assert not replica_registry._watchers


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.002)
    pytest.fail("not within 4 s")


def running(router: Router, replica: str) -> int | None:
    row = router.fleet.row(replica)
    return None if row is None else router.fleet.state(row).load.running


async def test_a_new_replica_is_subscribed_to_and_its_load_and_blocks_are_known(router, large) -> None:
    async with watching(router, large):
        await large.announce("r1", "r2")
        large.replicas["r1"].cache(1, 2)
        await until(lambda: running(router, "r1") == running(router, "r2") == 1)
        await until(lambda: router.index.overlaps([1, 2]) == {"r1": 2})
        assert sorted(large.calls[:2]) == ["r1", "r2"]
        large.replicas["r2"].load = load(running=3)
        large.replicas["r2"].reporter.publish()
        await until(lambda: running(router, "r2") == 3)


async def test_replicas_that_were_known_before_are_found(router, large) -> None:
    await large.announce("r1")
    async with watching(router, large):
        await until(lambda: running(router, "r1") == 1)


async def test_an_accepted_request_is_part_of_the_load(router, large) -> None:
    async with watching(router, large):
        await large.announce("r1")
        await until(lambda: large.replicas["r1"].subscribed)
        router.fleet.reserve("a", "r1", 50, yields=False)
        large.replicas["r1"].reporter.accept("a")
        large.replicas["r1"].reporter.publish()
        await until(lambda: router.fleet.num_reserved == 0)


async def test_a_replica_that_is_silent_is_asked_again(router, large) -> None:
    async with watching(router, large):
        await large.announce("r1")
        await until(lambda: large.replicas["r1"].subscribed >= 3)
        assert set(large.calls) == {"r1"}


async def test_a_replica_that_reports_is_left_in_peace(router, large) -> None:
    async with watching(router, large):
        await large.announce("r1")
        replica = large.replicas["r1"]
        await until(lambda: running(router, "r1") == 1)
        for number in range(30):
            replica.load = load(running=number)
            replica.reporter.publish()
            await asyncio.sleep(SILENCE / 10)
        assert replica.subscribed == 1


async def test_a_replica_that_is_gone_is_forgotten(router, large) -> None:
    async with watching(router, large) as watch:
        await large.announce("r1", "r2")
        large.replicas["r1"].cache(1)
        await until(lambda: router.index.overlaps([1]) == {"r1": 1} and running(router, "r2") == 1)
        await large.announce("r2")
        await until(lambda: router.fleet.replicas("large") == {"r2"})
        assert running(router, "r1") is None
        assert router.index.overlaps([1]) == {}
        calls = large.calls.count("r1")
        # It still has requests to finish, and reports while it does.
        replica = large.replicas["r1"]
        for number in range(20):
            replica.cache(10 + number)
            replica.reporter.publish()
            await asyncio.sleep(SILENCE / 10)
        assert large.calls.count("r1") == calls
        assert router.index.overlaps([10]) == {}
        assert "r1" not in router.index.replicas
        assert set(watch._receiver._senders) <= {"r2"}
        assert set(watch._asked) <= {"r2"}


async def test_a_snapshot_that_comes_too_late_is_forgotten(router, large) -> None:
    async with watching(router, large) as watch:
        large.replicas["r1"] = Replica("large", "r1")
        large.replicas["r1"].cache(1)
        large.replicas["r1"].reporter.subscribe(watch._receiver.endpoint)
        await large.announce("r2")
        await until(lambda: running(router, "r2") == 1)
        await asyncio.sleep(0.02)
        assert "r1" not in router.index.replicas
        assert "r1" not in large.calls


async def test_a_replica_that_comes_back_is_asked_at_once(router, large, monkeypatch) -> None:
    monkeypatch.setattr(fleet_watch, "ASK_SECONDS", 100.0)
    async with watching(router, large):
        await large.announce("r1")
        await until(lambda: running(router, "r1") == 1)
        await large.announce()
        await until(lambda: running(router, "r1") is None)
        await large.announce("r1")
        await until(lambda: running(router, "r1") == 1)
        assert large.calls == ["r1", "r1"]


async def test_a_call_that_fails_is_made_again(router, large, caplog) -> None:
    async with watching(router, large):
        large.failures = [RuntimeError("no route"), TimeoutError("slow")]
        await large.announce("r1")
        await until(lambda: running(router, "r1") == 1)
        assert len(large.calls) >= 3
    assert "no route" in caplog.text


async def test_only_one_call_to_a_replica_is_under_way(router, large) -> None:
    large.hangs = True
    async with watching(router, large) as watch:
        await large.announce("r1", "r2")
        await until(lambda: len(large.calls) == 2)
        await asyncio.sleep(2 * SILENCE)
        assert sorted(large.calls) == ["r1", "r2"]
        assert len(watch._calls) == 2


async def test_a_call_that_hangs_is_given_up(router, large, monkeypatch) -> None:
    monkeypatch.setattr(fleet_watch, "CALL_SECONDS", 0.02)
    large.hangs = True
    async with watching(router, large):
        await large.announce("r1")
        await until(lambda: len(large.calls) >= 2)
        large.hangs = False
        await until(lambda: running(router, "r1") == 1)


async def test_where_no_replica_is_known_serve_is_asked(router, large) -> None:
    large.asleep = [RuntimeError("not yet")]
    async with watching(router, large):
        await until(lambda: large.woken >= 2)
        await large.announce("r1")
        await until(lambda: running(router, "r1") == 1)
        woken = large.woken
        await asyncio.sleep(0.05)
        assert large.woken == woken


async def test_deployments_of_others_are_no_ones_business(router, large) -> None:
    async with watching(router, large):
        await Deployment("small").announce("x1")
        await large.announce("r1")
        await until(lambda: running(router, "r1") == 1)
        assert router.fleet.replicas("small") == set()


async def test_every_deployment_has_its_replicas(router, large) -> None:
    small = Deployment("small")
    async with watching(router, large, small):
        await large.announce("r1")
        await small.announce("s1")
        await until(lambda: running(router, "r1") == running(router, "s1") == 1)
        assert (router.fleet.replicas("large"), router.fleet.replicas("small")) == ({"r1"}, {"s1"})
    for replica in small.replicas.values():
        replica.reporter.close()
