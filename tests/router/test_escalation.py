"""The beginning of an answer is judged unseen, and what was judged well comes out again as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from raytroupe.cluster.request import TokenLogprobs
from raytroupe.cluster.router_config import EscalationConfig
from raytroupe.router.escalation import DraftUnsure, Escalation
from raytroupe.router.generation import Delta, TokenChance

Update = tuple[Any, Delta]


def delta(*logprobs: float, end: bool = False) -> Update:
    chances = [TokenChance(7, TokenLogprobs(value, []), 0) for value in logprobs]
    return "choice", Delta("x", [7] * len(logprobs), chances, "stop" if end else None)


class Stream:
    """Updates that are given out one by one."""

    def __init__(self, *updates: Update | Exception) -> None:
        self.updates = list(updates)
        self.given = self.closed = 0

    def __aiter__(self) -> AsyncIterator[Update]:
        return self

    async def __anext__(self) -> Update:
        if self.given == len(self.updates):
            raise StopAsyncIteration
        await asyncio.sleep(0)
        self.given += 1
        update = self.updates[self.given - 1]
        if isinstance(update, Exception):
            raise update
        return update

    async def aclose(self) -> None:
        self.closed += 1


def judge(tokens: int = 3, min_logprob: float = -0.5) -> Escalation:
    return Escalation(EscalationConfig(draft="small", tokens=tokens, min_logprob=min_logprob))


async def test_no_more_is_read_than_is_judged() -> None:
    stream = Stream(*[delta(-0.1)] * 10)
    await judge().check(stream)
    assert stream.given == 3
    assert stream.closed == 0


@pytest.mark.parametrize(
    "updates",
    [
        [delta(-0.1)] * 9,
        [delta(-0.1, -0.2), delta(-0.3, -0.4), delta(-9.0)],
        [delta(-0.1), delta(), delta(-0.1), delta(-0.1), delta(end=True)],
        [delta(-0.1), delta(-0.2, end=True)],
        [delta(end=True)],
        [],
    ],
)
async def test_what_was_judged_well_comes_out_as_it_was(updates) -> None:
    stream = Stream(*updates)
    checked = await judge().check(stream)
    assert [update async for update in checked] == updates
    await checked.aclose()
    assert stream.closed == 1


@pytest.mark.parametrize(
    ("logprobs", "sure"),
    [
        ([-0.5, -0.5, -0.5], True),
        ([-0.5, -0.5, -0.51], False),
        ([-1.4, 0.0, 0.0], True),
        ([-0.1, -0.1, -0.1, -99.0], True),  # the fourth is not judged
        ([float("-inf"), 0.0, 0.0], False),
        ([-0.6], False),  # all that there is
    ],
)
async def test_the_mean_of_the_first_tokens_decides(logprobs, sure) -> None:
    stream = Stream(*map(delta, logprobs))
    if sure:
        await judge().check(stream)
        assert stream.closed == 0
    else:
        with pytest.raises(DraftUnsure, match="looked unsure"):
            await judge().check(stream)
        assert stream.closed == 1


async def test_tokens_that_came_together_are_judged_together() -> None:
    with pytest.raises(DraftUnsure):
        await judge().check(Stream(delta(-0.1, -0.1, -0.1, -9.0)))


async def test_an_error_of_the_draft_is_an_error() -> None:
    stream = Stream(delta(-0.1), ValueError("bug"))
    with pytest.raises(ValueError, match="bug"):
        await judge().check(stream)
    assert stream.closed == 1


async def test_an_error_after_what_was_judged_comes_when_it_is_read() -> None:
    checked = await judge(tokens=1).check(Stream(delta(-0.1), ValueError("bug")))
    assert await anext(checked) == delta(-0.1)
    with pytest.raises(ValueError, match="bug"):
        await anext(checked)


async def test_a_check_that_is_cancelled_closes_the_draft() -> None:
    stream = Stream(*[delta(-0.1)] * 9)
    checking = asyncio.create_task(judge(tokens=8).check(stream))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    checking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checking
    assert stream.closed == 1
