"""Where plans run: the engine loop's view of its shards, and the simplest kind, a thread in the same process."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from ..cluster.errors import ShardFailed, StepFailed
from ..cluster.step import StepPlan, StepResult


class Executor(Protocol):
    """Runs plans in the order of submission on all shards of a replica. Used from one event loop."""

    def submit(self, plan: StepPlan) -> None:
        """Hand over a plan; returns at once.

        Raises:
            ShardFailed: a shard has failed before or the executor is closed.
        """

    async def result(self) -> StepResult:
        """The result of the oldest plan whose result has not been taken.

        Raises:
            ShardFailed: a shard raised or died; the executor is of no further use.
        """

    def close(self) -> None:
        """Stop the shards; may be called twice."""


class Pending(Protocol):
    """A step that has been launched and not awaited."""

    def result(self) -> StepResult:
        """Wait for it; called in the order of the launches, from one thread, which need not be the launching one."""


Launch = Callable[[StepPlan], StepResult | Pending | None]
"""Starts a step. What comes back is its result if it is done already, as on a CPU; what to wait for, as on a GPU; or
None on a shard that reports nothing."""


class LocalExecutor:
    """`Executor` over one shard in this process, which runs in a thread of its own.

    torch leaves the interpreter lock while it computes, so the event loop goes on meanwhile. A second thread waits for
    steps that are under way and wakes the event loop, so that the next is launched at once: a thread that wakes another
    loses the interpreter lock to it, and would wait until the loop has planned and published.
    """

    def __init__(self, launch: Launch) -> None:
        """`launch` is that of a shard that is its replica's only one, so that it returns every result."""
        self._launch = launch
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[tuple[int, StepResult | Pending | ShardFailed] | None] = queue.SimpleQueue()
        self._outcomes: collections.deque[StepResult | ShardFailed] = collections.deque()
        self._in_flight = 0
        self._waiter: asyncio.Future[None] | None = None
        self._failure: ShardFailed | None = None
        self._threads = [
            threading.Thread(target=self._launch_plans, name="shard", daemon=True),
            threading.Thread(target=self._report_steps, name="results", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, plan: StepPlan) -> None:
        """See `Executor`."""
        if self._failure is not None:
            raise self._failure
        self._in_flight += 1
        self._plans.put(plan)

    async def result(self) -> StepResult:
        """See `Executor`. A cancelled call loses nothing: the next one returns what it waited for."""
        assert self._in_flight, "no plan is in flight"
        while not self._outcomes:
            self._waiter = asyncio.get_running_loop().create_future()
            if not self._outcomes:  # one may have come before there was somebody to wake
                await self._waiter
            self._waiter = None
        self._in_flight -= 1
        outcome = self._outcomes.popleft()
        if isinstance(outcome, ShardFailed):
            raise outcome
        return outcome

    def close(self) -> None:
        """Let the steps that were launched end, drop the plans that wait, and end the threads."""
        if self._failure is None:
            self._failure = ShardFailed("the local shard is closed")
        self._plans.put(None)
        for thread in self._threads:
            thread.join()

    def _launch_plans(self) -> None:
        while (plan := self._plans.get()) is not None:
            self._launched.put((plan.step, self._failure or self._launch_one(plan)))
        self._launched.put(None)

    def _launch_one(self, plan: StepPlan) -> StepResult | Pending | ShardFailed:
        try:
            launched = self._launch(plan)
            assert launched is not None, "a shard that is alone reports every step"
        except Exception as error:
            return self._fail(plan.step, error)
        return launched

    def _report_steps(self) -> None:
        while (item := self._launched.get()) is not None:
            step, launched = item
            self._outcomes.append(
                launched if isinstance(launched, StepResult | ShardFailed) else self._await(step, launched)
            )
            waiter = self._waiter
            if waiter is not None:
                with contextlib.suppress(RuntimeError):  # its loop is closed
                    waiter.get_loop().call_soon_threadsafe(_wake, waiter)

    def _await(self, step: int, pending: Pending) -> StepResult | ShardFailed:
        try:
            return pending.result()
        except Exception as error:
            return self._fail(step, error)

    def _fail(self, step: int, error: Exception) -> ShardFailed:
        failure = StepFailed(f"the local shard failed in step {step}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self._failure = failure
        return failure


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
