"""When the engine's loop plans."""

from __future__ import annotations

import asyncio

import pytest

from raytroupe.actors.engine_loop import EngineLoop
from raytroupe.cluster.latency_class import BATCH, DEFAULT, DEFAULT_TARGETS
from raytroupe.cluster.replica_report import StepCurve
from raytroupe.cluster.request import EngineRequest, SamplingParams
from raytroupe.cluster.scheduler import Scheduler
from raytroupe.cluster.scheduler_config import SchedulerConfig
from raytroupe.cluster.step import StepPlan, StepResult


class HeldExecutor:
    """Keeps plans; a result comes when the test gives it."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self._results: asyncio.Queue[StepResult] = asyncio.Queue()

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)

    async def result(self) -> StepResult:
        return await self._results.get()

    def give(self, plan: StepPlan) -> None:
        self._results.put_nowait(StepResult(plan.step, [7] * sum(plan.samples), None, 0.0, 0.0))

    async def hold(self, plans: int) -> None:
        while len(self.plans) < plans:  # noqa: ASYNC110 - pytest-timeout bounds it
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("kind", "at_once"), [(BATCH, 1), (DEFAULT, 2)])
async def test_a_step_that_yields_is_planned_in_time_though_nothing_happens(kind, at_once):
    limits = SchedulerConfig(
        num_blocks=101, block_size=4, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=32, max_num_waiting=2
    )
    scheduler = Scheduler(limits)
    scheduler.pace.curve = StepCurve(base=0.1, prefill_token=0.0, decode_row=0.0)
    executor = HeldExecutor()
    engine = EngineLoop(scheduler, executor, lambda outputs: None)
    running = asyncio.create_task(engine.run())
    sampling = SamplingParams(max_tokens=50)
    engine.add(EngineRequest(request_id="a", prompt=[1], sampling=sampling, latency=DEFAULT_TARGETS[kind]))
    await executor.hold(1)
    await asyncio.sleep(0)
    assert len(executor.plans) == at_once
    await executor.hold(2)
    assert scheduler.num_in_flight == 2, "the second one did not wait for the first one's result"
    executor.give(executor.plans[0])
    await executor.hold(3)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
