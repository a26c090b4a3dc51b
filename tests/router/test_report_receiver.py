"""Reports travel from a replica's scheduler to an ingress's index over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
import numpy as np
import pytest
import zmq

from raytroupe.actors.load_reporter import LoadReporter, pack_hashes
from raytroupe.cluster.block_hash import short_hash
from raytroupe.cluster.block_pool import BlockPool
from raytroupe.cluster.replica_report import ReplicaLoad, ReplicaReport
from raytroupe.cluster.secure_socket import SecureContext
from raytroupe.router import report_receiver
from raytroupe.router.prefix_index import PrefixIndex
from raytroupe.router.report_receiver import ASK_SECONDS, SILENCE_SECONDS, ReportReceiver

LOAD = ReplicaLoad(1, 0, 2, 0, 30, 0, 7, 9, 4, 64, None, 0.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Ingress:
    """A receiver and what it has said."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.index = PrefixIndex(100_000)
        self.reports: list[ReplicaReport] = []
        self.gaps: list[tuple[str, str]] = []
        self.receiver = ReportReceiver(
            "127.0.0.1", self.index, self.reports.append, lambda *replica: self.gaps.append(replica), self.clock
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(5000):
            if condition():
                return
            await asyncio.sleep(0.002)
        pytest.fail("not within 10 s")

    async def reported(self, count: int) -> None:
        """Until so many reports have come."""
        await self.until(lambda: len(self.reports) >= count)
        assert len(self.reports) == count


@pytest.fixture
async def ingress() -> AsyncIterator[Ingress]:
    ingress = Ingress()
    ingress.receiver.start()
    yield ingress
    ingress.receiver.close()


@pytest.fixture
def send(ingress: Ingress) -> Iterator[Callable[..., None]]:
    """Sends a report of `replica` with short hashes, as a replica would."""
    with SecureContext() as context:
        socket = context.connect(zmq.PUSH, ingress.receiver.endpoint)

        def send(number: int, stored=(), evicted=(), replica: str = "r1", **fields: object) -> None:
            packed = {"stored": np.array(stored, "<u8").tobytes(), "evicted": np.array(evicted, "<u8").tobytes()}
            report = ReplicaReport(model="m", replica=replica, number=number, load=LOAD, **packed, **fields)
            socket.send(msgspec.msgpack.encode(report))

        send.socket = socket  # type: ignore[attr-defined]
        yield send


class Replica:
    """A block pool with its reporter."""

    def __init__(self, name: str, blocks: int = 33) -> None:
        self.pool = BlockPool(blocks)
        self.reporter = LoadReporter("m", name, self.pool, lambda: LOAD, interval_s=0)

    def cache(self, *contents: bytes) -> None:
        """Hold these contents for a moment."""
        blocks = self.pool.allocate(len(contents))
        assert blocks is not None
        for block, content in zip(blocks, contents, strict=True):
            self.pool.register(block, content)
        self.pool.release(blocks)


@pytest.fixture
def replica() -> Iterator[Replica]:
    replica = Replica("r1")
    yield replica
    replica.reporter.close()


def digest(number: int) -> bytes:
    return number.to_bytes(16, "little")


def digests(*numbers: int) -> list[bytes]:
    return [digest(number) for number in numbers]


async def test_an_index_follows_the_cache(ingress: Ingress, replica: Replica) -> None:
    replica.cache(*digests(1, 2, 3))
    replica.reporter.subscribe(ingress.receiver.endpoint)
    await ingress.reported(1)
    assert ingress.index.overlaps([1, 2, 3, 4]) == {"r1": 3}
    replica.cache(digest(4))
    replica.reporter.accept("request")
    replica.reporter.publish()
    await ingress.reported(2)
    assert ingress.index.overlaps([1, 2, 3, 4]) == {"r1": 4}
    assert ingress.reports[1].load == LOAD
    assert ingress.reports[1].accepted == ["request"]
    replica.cache(*digests(*range(10, 39)))  # one more than there are blocks besides the three
    replica.reporter.publish()
    await ingress.reported(3)
    expected = {short_hash(content) for content in replica.pool.cached_contents()}
    assert ingress.index.num_blocks == len(expected) == 32
    assert all(bool(ingress.index.overlaps([number])) == (number in expected) for number in range(1, 40))
    assert ingress.gaps == []
    assert ingress.receiver.is_current("r1")


async def test_a_lost_report_is_healed_by_a_snapshot(ingress: Ingress, replica: Replica) -> None:
    replica.reporter.subscribe(ingress.receiver.endpoint)
    replica.cache(digest(1))
    replica.reporter.publish()
    await ingress.reported(2)
    lost = replica.reporter._connections.pop(ingress.receiver.endpoint)
    replica.reporter._connections["elsewhere"] = type("Hole", (), {"send": lambda self, message: None})()
    replica.cache(digest(2))
    replica.reporter.publish()
    replica.reporter._connections = {ingress.receiver.endpoint: lost}
    replica.cache(digest(3))
    replica.reporter.publish()
    await ingress.reported(3)
    assert ingress.gaps == [("m", "r1")]
    assert not ingress.receiver.is_current("r1")
    assert ingress.index.overlaps([1, 2, 3]) == {"r1": 1}, "what was known stays"
    assert ingress.index.overlaps([3]) == {}, "events behind a gap are not taken in"
    replica.reporter.subscribe(ingress.receiver.endpoint)
    await ingress.reported(4)
    assert ingress.receiver.is_current("r1")
    assert ingress.index.overlaps([1, 2, 3]) == {"r1": 3}
    replica.cache(digest(4))
    replica.reporter.publish()
    await ingress.reported(5)
    assert ingress.index.overlaps([1, 2, 3, 4]) == {"r1": 4}
    assert len(ingress.gaps) == 1


async def test_a_lost_last_report_is_noticed_by_the_heartbeat(ingress: Ingress, send) -> None:
    send(7, [1], snapshot=True)
    send(9)  # nothing new: the heartbeat behind a lost report
    await ingress.reported(2)
    assert ingress.gaps == [("m", "r1")]


async def test_a_new_replica_takes_the_place_of_one_that_died(ingress: Ingress, replica: Replica) -> None:
    replica.cache(*digests(1, 2))
    replica.reporter.subscribe(ingress.receiver.endpoint)
    await ingress.reported(1)
    ingress.receiver.forget("r1")
    assert ingress.index.overlaps([1, 2]) == {}
    assert not ingress.receiver.is_current("r1")
    successor = Replica("r2")
    successor.cache(digest(1))
    successor.reporter.subscribe(ingress.receiver.endpoint)
    await ingress.reported(2)
    assert ingress.index.overlaps([1, 2]) == {"r2": 1}
    successor.reporter.close()


async def test_a_replica_that_begins_anew_under_its_name_is_known_by_its_snapshot_only(ingress: Ingress, send) -> None:
    send(100, [1, 2, 3], snapshot=True)
    send(1, [4])
    await ingress.reported(2)
    assert ingress.gaps == [("m", "r1")], "numbers that go back are a gap"
    send(0, [1, 9], snapshot=True)
    send(1, [2])
    await ingress.reported(4)
    assert ingress.index.overlaps([1, 2, 3]) == {"r1": 2}
    assert ingress.index.overlaps([9, 4]) == {"r1": 1}


async def test_a_replica_without_a_snapshot_is_asked_for_one_and_its_load_counts(ingress: Ingress, send) -> None:
    for number in range(3, 6):
        send(number, [number])
    await ingress.reported(3)
    assert ingress.gaps == [("m", "r1")], "once a second"
    assert ingress.index.replicas == []
    ingress.clock.now += ASK_SECONDS
    send(6)
    await ingress.reported(4)
    assert len(ingress.gaps) == 2, "until the snapshot comes"
    send(6, [1], snapshot=True)
    send(7, [2])
    await ingress.reported(6)
    assert len(ingress.gaps) == 2
    assert ingress.index.overlaps([1, 2]) == {"r1": 2}


async def test_a_repeated_report_is_ignored(ingress: Ingress, send) -> None:
    send(1, [1], snapshot=True)
    send(2, [2])
    send(2, [3])
    send(3, [4])
    await ingress.reported(3)
    assert ingress.gaps == []
    assert ingress.index.overlaps([3]) == {}
    assert ingress.index.overlaps([1, 2, 4]) == {"r1": 3}


async def test_malformed_reports_are_dropped(ingress: Ingress, send, caplog: pytest.LogCaptureFixture) -> None:
    send(1, [1], snapshot=True)
    send.socket.send(b"not a report")
    cut = ReplicaReport(model="m", replica="r1", number=2, load=LOAD, stored=b"1234567")
    send.socket.send(msgspec.msgpack.encode(cut))
    send(2, [(1 << 64) - 1, 2])
    await ingress.reported(2)
    assert ingress.index.overlaps([(1 << 60) - 1, 2, 1]) == {"r1": 3}, "hashes have 60 bits, whatever was sent"
    assert ingress.gaps == []
    assert len(caplog.records) == 2


async def test_a_large_snapshot_is_taken_in_between_other_tasks(
    ingress: Ingress, send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_receiver, "_PART", 10)
    monkeypatch.setattr(report_receiver, "WORK_SECONDS", -1.0)  # over before the first
    send(1, range(1000), snapshot=True)
    send(2, [2000], [995])
    await ingress.reported(2)
    assert ingress.index.num_blocks < 1000, "not in one go"
    assert ingress.receiver.is_current("r1")
    ingress.receiver.forget("r2")
    monkeypatch.setattr(report_receiver, "WORK_SECONDS", 1e-6)
    await ingress.until(lambda: not ingress.receiver._work)
    assert ingress.index.overlaps(range(1000)) == {"r1": 995}, "in order"
    assert ingress.index.overlaps([2000]) == {"r1": 1}


async def test_silence_is_a_gap(ingress: Ingress, send) -> None:
    assert ingress.receiver.silence("r1") == float("inf")
    send(1, snapshot=True)
    await ingress.reported(1)
    ingress.receiver.watch()
    ingress.clock.now += SILENCE_SECONDS + 0.1
    assert ingress.receiver.silence("r1") > SILENCE_SECONDS
    ingress.receiver.watch()
    ingress.receiver.watch()
    assert ingress.gaps == [("m", "r1")]
    ingress.receiver.forget("r1")
    ingress.clock.now += 10
    ingress.receiver.watch()
    assert len(ingress.gaps) == 1


def test_hashes_are_packed_as_they_are_made() -> None:
    contents = [bytes(range(start, start + 16)) for start in (0, 100, 239)]
    assert np.frombuffer(pack_hashes(contents), "<u8").tolist() == [short_hash(content) for content in contents]
    assert pack_hashes([]) == b""
