"""A replica in simulated time: the real scheduler, steps that take exactly what a curve says, and made-up tokens."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

from raytroupe.cluster.errors import TargetUnreachable
from raytroupe.cluster.latency_class import DEFAULT_TARGETS
from raytroupe.cluster.replica_report import StepCurve
from raytroupe.cluster.request import EngineRequest, SamplingParams
from raytroupe.cluster.scheduler import Scheduler
from raytroupe.cluster.scheduler_config import SchedulerConfig
from raytroupe.cluster.scheduler_stats import RequestTimes
from raytroupe.cluster.step import StepPlan, StepResult


class SimulatedReplica:
    """Runs requests that arrive at given times; as the engine loop does, with plans in flight.

    Args:
        curve: what a step takes.
        gap: seconds that a plan takes to reach the shards.
    """

    def __init__(self, curve: StepCurve, config: SchedulerConfig, gap: float = 0.0) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(config, clock=lambda: self.now)
        self.scheduler.pace.curve = curve
        self.curve = curve
        self.finished: list[RequestTimes] = []
        self.refused: list[TargetUnreachable] = []
        self._gap = gap
        self._plans: deque[tuple[float, StepPlan]] = deque()
        self._plan_at: float | None = None

    def run(
        self, arrivals: Iterator[tuple[float, EngineRequest]], backlog: Iterator[EngineRequest], until: float
    ) -> None:
        """Serve `arrivals`, (time, request) in order of time, while 4 of `backlog` wait always."""
        scheduler = self.scheduler
        coming = next(arrivals, None)
        while self.now < until:
            while scheduler.snapshot().waiting < 4 and (request := next(backlog, None)) is not None:
                scheduler.add(request)
            self._fill()
            ends = self._plans[0][0] if self._plans else until
            if self._plan_at is not None and self._plan_at < min(ends, coming[0] if coming else ends):
                self.now = max(self.now, self._plan_at)
                continue
            if coming is not None and coming[0] <= ends:
                self.now = max(self.now, coming[0])
                try:
                    scheduler.add(coming[1])
                except TargetUnreachable as error:
                    self.refused.append(error)
                coming = next(arrivals, None)
                continue
            self.now = ends
            if self._plans:
                _, plan = self._plans.popleft()
                scheduler.update(StepResult(plan.step, [7] * sum(plan.samples), None, 0.0, 0.0))
                self.finished += scheduler.stats.drain_finished()

    def _fill(self) -> None:
        scheduler = self.scheduler
        self.refused += [error for _, error in scheduler.refuse_late()]
        while scheduler.num_in_flight < scheduler.max_in_flight and (plan := scheduler.schedule()):
            free = self._plans[-1][0] if self._plans else self.now
            begins = max(free, self.now + self._gap)
            prompts = sum(plan.counts[plan.decode_rows :])
            self._plans.append((begins + self.curve.seconds(prompts, plan.decode_rows), plan))
        self._plan_at = scheduler.plan_at


def requests(
    kind: str, prompt_len: tuple[int, int], max_tokens: tuple[int, int], seed: int = 1
) -> Iterator[EngineRequest]:
    """Requests of one class without end; lengths are drawn from ranges, and no two share a prefix."""
    rng = random.Random(f"{kind} {seed}")
    number = 0
    while True:
        number += 1
        prompt = [rng.randrange(1_000_000), *range(rng.randint(*prompt_len) - 1)]
        sampling = SamplingParams(max_tokens=rng.randint(*max_tokens))
        yield EngineRequest(
            request_id=f"{kind}-{number}", prompt=prompt, sampling=sampling, latency=DEFAULT_TARGETS[kind]
        )


def poisson(source: Iterator[EngineRequest], rate: float, seed: int = 2) -> Iterator[tuple[float, EngineRequest]]:
    """`rate` requests a second."""
    rng = random.Random(seed)
    now = 0.0
    for request in source:
        now += rng.expovariate(rate)
        yield now, request
