"""A scheduler, requests for it and steps of it, small enough to count by hand."""

from __future__ import annotations

from raytroupe.cluster.request import EngineRequest, SamplingParams, TokenOutput
from raytroupe.cluster.scheduler import Scheduler
from raytroupe.cluster.scheduler_config import SchedulerConfig
from raytroupe.cluster.step import StepPlan, StepResult


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_scheduler(clock: Clock | None = None, **overrides) -> Scheduler:
    limits = {
        "num_blocks": 101,
        "block_size": 4,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
    }
    return Scheduler(SchedulerConfig(**(limits | overrides)), clock or Clock())


def request(name: str, length: int, max_tokens: int = 8, first: int = 0, **fields) -> EngineRequest:
    sampling = SamplingParams(max_tokens=max_tokens, **fields.pop("sampling", {}))
    prompt = [first, *range(100, 99 + length)]
    return EngineRequest(request_id=name, prompt=prompt, sampling=sampling, **fields)


def result_of(plan: StepPlan, token: int = 7) -> StepResult:
    return StepResult(plan.step, [token] * sum(plan.samples), None, 0.0, 0.0)


def step(scheduler: Scheduler, token: int = 7) -> tuple[StepPlan, dict[str, TokenOutput]]:
    plan = scheduler.schedule()
    assert plan is not None
    outputs = scheduler.update(result_of(plan, token))
    scheduler.check_integrity()
    return plan, {output.request_id: output for output in outputs}
