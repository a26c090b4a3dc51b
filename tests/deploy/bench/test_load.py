"""Closed loops keep to their number of clients; open loops keep to their arrivals whatever the server does."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator

import pytest

from raytroupe.deploy.bench.client import BenchClient, Outcome, ServerOptions, parse_url
from raytroupe.deploy.bench.load import closed_loop, open_loop
from raytroupe.deploy.bench.workload import Request

from .conftest import StreamServer


def requests(count: int, gap: float = 0.0, output_len: int = 4) -> Iterator[Request]:
    return (Request([20, 21], 2, output_len, arrival=index * gap) for index in range(count))


def client(server: StreamServer, model: str) -> BenchClient:
    return BenchClient(ServerOptions(url=parse_url(server.url), model=model))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_closed_loop_keeps_so_many_under_way(server: StreamServer, concurrency: int) -> None:
    outcomes: list[Outcome] = []
    ticks = itertools.count()
    load = closed_loop(client(server, "slow"), requests(6), concurrency, outcomes, tick=lambda: next(ticks))
    asyncio.run(load)
    assert server.most_under_way == concurrency
    assert [outcome.error for outcome in outcomes] == [None] * 6
    assert next(ticks) == 6
    assert server.connections == concurrency


def test_closed_loop_ends_with_its_duration(server: StreamServer) -> None:
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    asyncio.run(closed_loop(client(server, "slow"), requests(10_000), 2, outcomes, duration=0.5))
    assert 0.5 < time.perf_counter() - start < 5
    assert 2 <= len(outcomes) < 100
    assert all(outcome.error is None for outcome in outcomes), "what was sent is awaited"


def test_open_loop_does_not_wait_for_a_slow_server(server: StreamServer) -> None:
    outcomes: list[Outcome] = []
    asyncio.run(open_loop(client(server, "slow"), requests(20, gap=0.02), outcomes))
    sent = [outcome.sent - outcomes[0].scheduled for outcome in outcomes]
    assert server.most_under_way > 5, "an answer takes 200 ms, and a request comes every 20 ms"
    assert sent[-1] < 2.0, "one after the other would take 4 s"
    assert [outcome.scheduled - outcomes[0].scheduled for outcome in outcomes] == pytest.approx(
        [index * 0.02 for index in range(20)]
    )
    assert all(outcome.sent >= outcome.scheduled for outcome in outcomes)


def test_a_stalled_client_is_charged_to_the_latency(server: StreamServer) -> None:
    """The clock of a request starts when it is due, not when the client gets round to it."""

    def stalling() -> Iterator[Request]:
        for request in requests(3, gap=0.05):
            if request.arrival == 0.1:
                time.sleep(0.4)
            yield request

    outcomes: list[Outcome] = []
    asyncio.run(open_loop(client(server, "plain"), stalling(), outcomes))
    last = outcomes[-1]
    assert last.scheduled - outcomes[0].scheduled == pytest.approx(0.1)
    assert last.sent - last.scheduled > 0.2
    assert last.token_times[0] - last.scheduled > 0.2


def test_open_loop_ends_with_its_duration(server: StreamServer) -> None:
    outcomes: list[Outcome] = []
    asyncio.run(open_loop(client(server, "plain"), requests(1000, gap=0.05), outcomes, duration=0.22))
    assert len(outcomes) == 5


def test_an_interrupted_load_keeps_what_it_has(server: StreamServer) -> None:
    outcomes: list[Outcome] = []

    async def interrupt() -> None:
        load = asyncio.ensure_future(closed_loop(client(server, "slow"), requests(100, output_len=8), 2, outcomes))
        while sum(outcome.error is None for outcome in outcomes) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load

    asyncio.run(interrupt())
    errors = [outcome.error for outcome in outcomes]
    assert errors[:2] == [None, None]
    assert errors.count("unfinished") == 2
