"""The engine's loop: schedule, run, update, publish."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from ..cluster.errors import TargetUnreachable
from ..cluster.request import EngineRequest, TokenOutput
from ..cluster.scheduler import Scheduler
from ..cluster.step import StepPlan, StepResult
from .executor import Executor


class EngineLoop:
    """Drives a scheduler and the shards behind an executor, in one asyncio task.

    While a plan runs, the next one is made and handed over already (`Scheduler.max_in_flight`), so that the shards
    never wait for scheduling.

    Args:
        scheduler: decides what runs.
        executor: runs it.
        publish: receives the outputs of every step that has any; must neither block nor raise.
        observe: receives the result of every step, for metrics.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        publish: Callable[[list[TokenOutput]], None],
        observe: Callable[[StepResult], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.last_progress = time.monotonic()
        """When a result came, or when work came after none was there."""
        self.refuse: Callable[[str, TargetUnreachable], None] | None = None
        """Told of every request that is refused after it has waited. Without it none is: nobody would learn of it."""
        self._last_result = 0.0
        self._submitted: deque[tuple[float, int, int]] = deque()
        """Per plan in flight: when, its tokens of prompts, and its sequences that decode."""
        self._executor = executor
        self._publish = publish
        self._observe = observe
        self._arrived = asyncio.Event()
        self._filling = False
        self._timer: asyncio.TimerHandle | None = None

    def add(self, request: EngineRequest) -> None:
        """Queue a request; raises as `Scheduler.add` does."""
        if not self.scheduler.has_work:
            self.last_progress = time.monotonic()
        self.scheduler.add(request)
        self._arrived.set()
        if self.scheduler.num_in_flight and not self._filling:
            # A plan is running: join the next one without waiting for its result, together with
            # all requests that arrive in this turn of the event loop.
            self._filling = True
            asyncio.get_running_loop().call_soon(self._fill)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks; False if it is not here."""
        return self.scheduler.abort(request_id)

    async def run(self) -> None:
        """Serve until cancelled.

        Raises:
            ShardFailed: from the executor; the requests that are in the scheduler are lost to this replica.
        """
        try:
            await self._run()
        finally:
            self._set_timer(None)

    async def _run(self) -> None:
        while True:
            self._fill()
            if not self.scheduler.num_in_flight:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            result = await self._executor.result()
            self._measure()
            outputs = self.scheduler.update(result)
            self._fill()  # before publishing: the shards come first
            if outputs:
                self._publish(outputs)
            if self._observe is not None:
                self._observe(result)

    def _fill(self) -> None:
        self._filling = False
        if self.refuse is not None:
            for request_id, error in self.scheduler.refuse_late():
                self.refuse(request_id, error)
        while self.scheduler.num_in_flight < self.scheduler.max_in_flight and (plan := self.scheduler.schedule()):
            self._submit(plan)
        self._set_timer(self.scheduler.plan_at)

    def _set_timer(self, plan_at: float | None) -> None:
        """Plan at that time (`time.monotonic`) whatever happens until then; None: only when something happens."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if plan_at is not None:
            wait = max(0.0, plan_at - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait, self._fill)

    def _submit(self, plan: StepPlan) -> None:
        self._executor.submit(plan)
        self._submitted.append((time.monotonic(), sum(plan.counts[plan.decode_rows :]), plan.decode_rows))

    def _measure(self) -> None:
        """A step has ended. It began when it was submitted, or when the one before it ended."""
        before, now = self._last_result, time.monotonic()
        self._last_result = self.last_progress = now
        submitted, prefill_tokens, decode_rows = self._submitted.popleft()
        self.scheduler.pace.step_ended(now - max(before, submitted), prefill_tokens, decode_rows)
