"""The two ways to put load on a server.

Closed loop: so many clients, each of which sends its next request when the last one is answered. A slow server is asked
less often.

Open loop: requests come when they are due, whatever the server does, as those of people who do not know of each other.
A slow server gets just as many, and latencies count from the due time: otherwise the requests that a stalled server has
held up would be left out of the figures (coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from .client import BenchClient, Outcome
from .workload import Request

Tick = Callable[[], None]
"""Called when a request has ended, however."""


async def closed_loop(
    client: BenchClient,
    requests: Iterator[Request],
    concurrency: int,
    outcomes: list[Outcome],
    *,
    duration: float | None = None,
    tick: Tick = lambda: None,
) -> None:
    """Send `requests` from `concurrency` clients until they are used up or no longer than `duration` seconds.

    Requests that are under way at the end are awaited. `outcomes` grows while this runs, so that it holds what was
    measured if this is cancelled.
    """
    deadline = time.perf_counter() + duration if duration is not None else float("inf")

    async def send_one_after_the_other() -> None:
        for request in requests:
            encoded = client.encode(request)
            now = time.perf_counter()
            if now >= deadline:
                return
            await _complete(client, encoded, request, now, outcomes, tick)

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(send_one_after_the_other())


async def open_loop(
    client: BenchClient,
    requests: Iterator[Request],
    outcomes: list[Outcome],
    *,
    duration: float | None = None,
    tick: Tick = lambda: None,
) -> None:
    """Send each of `requests` at its arrival time, as far as that is less than `duration` seconds.

    All requests are awaited at the end; `outcomes` grows as in `closed_loop`.
    """
    async with asyncio.TaskGroup() as under_way:
        upcoming = _encoded(client, requests, duration)
        following = next(upcoming, None)  # the first one is made before the clock starts
        start = time.perf_counter()
        while following is not None:
            request, encoded = following
            due = start + request.arrival
            await _sleep_until(due)
            under_way.create_task(_complete(client, encoded, request, due, outcomes, tick))
            await asyncio.sleep(0)  # lets it be sent before the next one is made
            following = next(upcoming, None)


async def _sleep_until(due: float) -> None:
    """Sleep until `due` of `time.perf_counter`; timers of event loops may ring up to a millisecond early."""
    while (wait := due - time.perf_counter()) > 0:  # noqa: ASYNC110 - no event, only time
        await asyncio.sleep(wait)


def _encoded(
    client: BenchClient, requests: Iterator[Request], duration: float | None
) -> Iterator[tuple[Request, bytes]]:
    for request in requests:
        if duration is not None and request.arrival >= duration:
            return
        yield request, client.encode(request)


async def _complete(
    client: BenchClient, encoded: bytes, request: Request, due: float, outcomes: list[Outcome], tick: Tick
) -> None:
    outcome = Outcome(prompt_len=request.prompt_len, wanted_len=request.output_len, scheduled=due, sent=due)
    outcomes.append(outcome)
    await client.complete(encoded, outcome)
    tick()
