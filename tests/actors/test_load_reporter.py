"""A replica's reports on their way to the ingresses, over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from raytroupe.actors.ingress_connection import CONNECT_SECONDS, RECONNECT_SECONDS
from raytroupe.actors.load_reporter import HEARTBEAT_SECONDS, LoadReporter, pack_hashes
from raytroupe.cluster.block_pool import BlockPool
from raytroupe.cluster.messages import Endpoint
from raytroupe.cluster.replica_report import ReplicaLoad, ReplicaReport
from raytroupe.cluster.secure_socket import SecureContext

LOAD = ReplicaLoad(1, 0, 2, 0, 30, 0, 7, 9, 4, 64, None, 0.0)


class Replica:
    """A block pool, a load and a clock that tests change, with their reporter."""

    def __init__(self, interval_s: float = 0.0) -> None:
        self.now = 100.0
        self.load = LOAD
        self.pool = BlockPool(9)
        self.reporter = LoadReporter(
            "model", "replica", self.pool, lambda: self.load, lambda: self.now, interval_s=interval_s
        )

    def cache(self, *contents: int) -> None:
        """Hold these contents for a moment."""
        blocks = self.pool.allocate(len(contents))
        assert blocks is not None
        for block, content in zip(blocks, contents, strict=True):
            self.pool.register(block, digest(content))
        self.pool.release(blocks)


class Ingress:
    """A PULL socket."""

    def __init__(self, context: SecureContext) -> None:
        self.socket, self.endpoint = context.bind(zmq.PULL, "127.0.0.1")

    def receive(self) -> ReplicaReport:
        assert self.socket.poll(10_000), "no report within 10 s"
        return msgspec.msgpack.decode(self.socket.recv(), type=ReplicaReport)

    async def receive_soon(self) -> ReplicaReport:
        """The same while the event loop runs."""
        for _ in range(1000):
            if self.socket.poll(0):
                break
            await asyncio.sleep(0.01)
        return self.receive()

    def has_more(self) -> bool:
        return bool(self.socket.poll(50))


@pytest.fixture
def context() -> Iterator[SecureContext]:
    with SecureContext() as context:
        yield context


@pytest.fixture
def replica() -> Iterator[Replica]:
    replica = Replica()
    yield replica
    replica.reporter.close()


@pytest.fixture
def ingress(context: SecureContext) -> Ingress:
    return Ingress(context)


def digest(content: int) -> bytes:
    return content.to_bytes(16, "little")


def packed(*contents: int) -> bytes:
    return pack_hashes([digest(content) for content in contents])


def test_a_subscription_begins_with_a_snapshot(replica: Replica, ingress: Ingress) -> None:
    replica.reporter.accept("early")
    replica.cache(1, 2)
    replica.reporter.subscribe(ingress.endpoint)
    replica.cache(3)
    replica.reporter.accept("late")
    replica.reporter.publish()
    expected = ReplicaReport(
        model="model",
        replica="replica",
        number=0,
        load=LOAD,
        snapshot=True,
        stored=packed(1, 2),
        accepted=["early"],
    )
    assert ingress.receive() == expected
    assert ingress.receive() == msgspec.structs.replace(
        expected, number=1, snapshot=False, stored=packed(3), accepted=["late"]
    )


def test_without_subscribers_nothing_is_recorded(replica: Replica) -> None:
    replica.cache(1)
    replica.reporter.accept("a")
    replica.reporter.publish()
    replica.reporter.watch()
    assert replica.pool.drain_events() == ([], [])
    assert replica.reporter._accepted == []


def test_reports_have_the_same_numbers_for_all(replica: Replica, context: SecureContext) -> None:
    one, two = Ingress(context), Ingress(context)
    replica.reporter.subscribe(one.endpoint)
    replica.cache(1)
    replica.reporter.publish()
    replica.cache(2)
    replica.reporter.subscribe(two.endpoint)
    replica.cache(3, 4, 5, 6, 7, 8, 9)
    replica.reporter.publish()
    first = [one.receive() for _ in range(4)]
    second = [two.receive() for _ in range(2)]
    assert [report.number for report in first] == [0, 1, 2, 3]
    assert [report.number for report in second] == [2, 3]
    assert second[0].snapshot
    assert second[0].stored == packed(1, 2)
    assert first[3] == second[1]
    assert first[3].evicted == packed(1)


def test_a_second_subscription_sends_a_second_snapshot(replica: Replica, ingress: Ingress) -> None:
    replica.reporter.subscribe(ingress.endpoint)
    replica.cache(1)
    replica.reporter.subscribe(ingress.endpoint)
    assert replica.reporter.num_subscribers == 1
    reports = [ingress.receive() for _ in range(3)]
    assert [(report.number, report.snapshot, report.stored) for report in reports] == [
        (0, True, b""),
        (1, False, packed(1)),
        (1, True, packed(1)),
    ]


def test_what_has_not_changed_is_reported_by_the_heartbeat_only(replica: Replica, ingress: Ingress) -> None:
    replica.reporter.subscribe(ingress.endpoint)
    ingress.receive()
    replica.reporter.publish()
    assert ingress.receive().number == 1
    replica.reporter.publish()
    assert not ingress.has_more()
    replica.load = msgspec.structs.replace(LOAD, running=5)
    replica.reporter.publish()
    assert ingress.receive().load.running == 5
    replica.reporter.watch()
    assert not ingress.has_more(), "a report has just been sent"
    replica.now += HEARTBEAT_SECONDS
    replica.reporter.watch()
    assert ingress.receive().number == 3
    assert not ingress.has_more()


async def test_what_follows_quickly_shares_a_report(ingress: Ingress) -> None:
    replica = Replica(interval_s=0.2)
    replica.reporter.subscribe(ingress.endpoint)
    replica.cache(1)
    replica.reporter.publish()
    for content in (2, 3, 4):
        replica.cache(content)
        replica.reporter.accept(f"request {content}")
        replica.reporter.publish()
    assert (await ingress.receive_soon()).snapshot
    assert (await ingress.receive_soon()).stored == packed(1), "the first does not wait"
    assert not ingress.has_more()
    report = await ingress.receive_soon()
    assert report.stored == packed(2, 3, 4)
    assert report.accepted == ["request 2", "request 3", "request 4"]
    replica.now += 1.0
    replica.cache(5)
    replica.reporter.publish()
    assert ingress.receive().stored == packed(5), "nor does one after a pause"
    replica.cache(6)
    replica.reporter.publish()
    replica.reporter.close()
    await asyncio.sleep(0.3)  # the timer has nothing left to do


def drop_when_gone(replica: Replica, endpoint: Endpoint) -> None:
    """Until the reporter has noticed that the connection is lost, and is not patient any more."""
    for _ in range(1000):
        replica.reporter.watch()
        if replica.reporter._connections[endpoint].dead_at is not None:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the loss was not noticed within 10 s")
    replica.now += RECONNECT_SECONDS
    replica.reporter.watch()


def test_an_ingress_that_is_gone_is_dropped(replica: Replica, ingress: Ingress) -> None:
    with SecureContext() as doomed:
        gone = Ingress(doomed)
        replica.reporter.subscribe(gone.endpoint)
        replica.reporter.subscribe(ingress.endpoint)
        gone.receive()
        for _ in range(1000):
            replica.reporter.watch()
            if replica.reporter._connections[gone.endpoint].dead_at is None:
                break
            time.sleep(0.01)
        doomed.close()
    drop_when_gone(replica, gone.endpoint)
    assert replica.reporter.num_subscribers == 1
    replica.cache(1)
    replica.reporter.publish()
    while not ingress.receive().stored:
        pass


def test_an_ingress_that_never_connects_is_dropped_and_recording_ends(replica: Replica, ingress: Ingress) -> None:
    ingress.socket.close(0)
    replica.reporter.subscribe(ingress.endpoint)
    replica.cache(1)
    replica.reporter.accept("a")
    replica.now += CONNECT_SECONDS
    replica.reporter.watch()
    assert replica.reporter.num_subscribers == 0
    assert replica.reporter._accepted == []
    assert replica.pool.drain_events() == ([], [])
    replica.cache(2)
    assert replica.pool.drain_events() == ([], [])
