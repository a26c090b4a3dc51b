"""Where plans run: the engine loop's view of its shards, and the simplest kind, a thread in the same process."""

from __future__ import annotations

import asyncio
import collections
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
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
    steps that are under way, so that the next is launched behind them at once.
    """

    def __init__(self, launch: Launch) -> None:
        """`launch` is that of a shard that is its replica's only one, so that it returns every result."""
        self._launch = launch
        self._plans: queue.SimpleQueue[tuple[StepPlan, Future[StepResult]] | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[tuple[int, Pending, Future[StepResult]] | None] = queue.SimpleQueue()
        self._pending: collections.deque[Future[StepResult]] = collections.deque()
        self._failure: ShardFailed | None = None
        self._threads = [
            threading.Thread(target=self._launch_plans, name="shard", daemon=True),
            threading.Thread(target=self._await_steps, name="results", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, plan: StepPlan) -> None:
        """See `Executor`."""
        if self._failure is not None:
            raise self._failure
        future: Future[StepResult] = Future()
        self._pending.append(future)
        self._plans.put((plan, future))

    async def result(self) -> StepResult:
        """See `Executor`. A cancelled call loses nothing: the next one returns what it waited for."""
        assert self._pending, "no plan is in flight"
        result = await asyncio.shield(asyncio.wrap_future(self._pending[0]))
        self._pending.popleft()
        return result

    def close(self) -> None:
        """Let the steps that were launched end, drop the plans that wait, and end the threads."""
        if self._failure is None:
            self._failure = ShardFailed("the local shard is closed")
        self._plans.put(None)
        for thread in self._threads:
            thread.join()

    def _launch_plans(self) -> None:
        while (item := self._plans.get()) is not None:
            plan, future = item
            if self._failure is not None:
                future.set_exception(self._failure)
                continue
            try:
                launched = self._launch(plan)
                assert launched is not None, "a shard that is alone reports every step"
            except Exception as error:
                self._fail(plan.step, error, future)
                continue
            if isinstance(launched, StepResult):
                future.set_result(launched)
            else:
                self._launched.put((plan.step, launched, future))
        self._launched.put(None)

    def _await_steps(self) -> None:
        while (item := self._launched.get()) is not None:
            step, pending, future = item
            try:
                future.set_result(pending.result())
            except Exception as error:
                self._fail(step, error, future)

    def _fail(self, step: int, error: Exception, future: Future[StepResult]) -> None:
        failure = StepFailed(f"the local shard failed in step {step}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self._failure = failure
        future.set_exception(failure)
