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


class LocalExecutor:
    """`Executor` over one shard in this process, which runs in a thread of its own.

    torch leaves the interpreter lock while it computes, so the event loop goes on meanwhile.
    """

    def __init__(self, run: Callable[[StepPlan], StepResult | None]) -> None:
        """`run` is the `run` of a shard that is its replica's only one, so that it returns every result."""
        self._run = run
        self._queue: queue.SimpleQueue[tuple[StepPlan, Future[StepResult]] | None] = queue.SimpleQueue()
        self._pending: collections.deque[Future[StepResult]] = collections.deque()
        self._failure: ShardFailed | None = None
        self._thread = threading.Thread(target=self._serve, name="shard", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """See `Executor`."""
        if self._failure is not None:
            raise self._failure
        future: Future[StepResult] = Future()
        self._pending.append(future)
        self._queue.put((plan, future))

    async def result(self) -> StepResult:
        """See `Executor`. A cancelled call loses nothing: the next one returns what it waited for."""
        assert self._pending, "no plan is in flight"
        result = await asyncio.shield(asyncio.wrap_future(self._pending[0]))
        self._pending.popleft()
        return result

    def close(self) -> None:
        """Let the plan that runs end, drop those that wait, and end the thread."""
        if self._failure is None:
            self._failure = ShardFailed("the local shard is closed")
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            plan, future = item
            if self._failure is not None:
                future.set_exception(self._failure)
                continue
            try:
                result = self._run(plan)
                assert result is not None, "a shard that is alone reports every step"
                future.set_result(result)
            except Exception as error:
                failure = StepFailed(f"the local shard failed in step {plan.step}: {type(error).__name__}: {error}")
                failure.__cause__ = error
                self._failure = failure
                future.set_exception(failure)
