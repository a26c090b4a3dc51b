"""Replicas in simulated time: real schedulers and block pools, real routers, and steps that take what a curve says.

Events are processed in the order of their times, so a run is exact and repeatable, and a thousand replicas take no more
than patience. Reports reach the router a little late, as they do over a network.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from ....cluster.block_hash import short_hashes
from ....cluster.latency_class import LatencyTargets
from ....cluster.replica_report import ReplicaLoad, StepCurve
from ....cluster.request import EngineRequest, SamplingParams
from ....cluster.scheduler import Scheduler
from ....cluster.scheduler_config import SchedulerConfig
from ....cluster.step import StepPlan, StepResult
from ..client import Outcome
from ..workload import Request

REPORT_SECONDS = 0.1
"""Between two reports of a replica, as in `actors/load_reporter.py`."""
NETWORK_SECONDS = 0.001
"""A report or a request takes so long to arrive."""


class Chooser(Protocol):
    """A way to choose the replica of a request."""

    def choose(self, request: EngineRequest) -> int:
        """The index of the replica."""

    def arrived(self, request_id: str, replica: int) -> None:
        """The replica has the request."""

    def started(self, request_id: str) -> None:
        """The request has its first token."""

    def ended(self, request_id: str, replica: int) -> None:
        """The request has ended there."""

    def report(
        self, replica: int, load: ReplicaLoad, stored: list[int], evicted: list[int], accepted: list[str]
    ) -> None:
        """What the replica says of itself."""


class SimulatedReplica:
    """One replica: its scheduler, and up to two plans in flight, as the engine loop has."""

    def __init__(self, index: int, config: SchedulerConfig, curve: StepCurve, clock: Callable[[], float]) -> None:
        self.index = index
        self.scheduler = Scheduler(config, clock)
        self.scheduler.kv.pool.record_events(True)
        self.curve = curve
        self.plans: deque[tuple[StepPlan, float]] = deque()
        """Plans in flight, with the seconds that each takes."""
        self.running = False
        """The first of them is being executed."""
        self.accepted: list[str] = []
        self.report_due = False
        self.next_report = 0.0

    def fill(self) -> None:
        """Plan as far ahead as may be."""
        scheduler = self.scheduler
        while scheduler.num_in_flight < scheduler.max_in_flight and (plan := scheduler.schedule()) is not None:
            prefill = sum(plan.counts[plan.decode_rows :])
            self.plans.append((plan, self.curve.seconds(prefill, plan.decode_rows)))

    def result(self) -> tuple[StepPlan, StepResult, float]:
        """Of the plan that has just been executed."""
        plan, seconds = self.plans.popleft()
        sampled = sum(plan.samples)
        return plan, StepResult(plan.step, [0] * sampled, None, seconds, seconds), seconds


class Simulation:
    """Replicas and clients on one clock.

    Args:
        replicas: how many.
        config: of every replica's scheduler.
        curve: of every replica's steps.
        make_chooser: gets the clock.
    """

    def __init__(
        self,
        replicas: int,
        config: SchedulerConfig,
        curve: StepCurve,
        make_chooser: Callable[[Callable[[], float]], Chooser],
    ) -> None:
        self.now = 0.0
        self.replicas = [SimulatedReplica(index, config, curve, lambda: self.now) for index in range(replicas)]
        self.outcomes: list[Outcome] = []
        self._chooser = make_chooser(lambda: self.now)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._open: dict[str, tuple[Outcome, int]] = {}
        self._ids = itertools.count()
        self._next: Iterator[Request] = iter(())
        self._latency = LatencyTargets()

    def closed_loop(self, requests: Iterator[Request], clients: int, latency: LatencyTargets) -> None:
        """Serve `requests`, of which each client has one at a time; returns when all have ended."""
        self._next, self._latency = requests, latency
        for _ in range(clients):
            self._send_next()
        self._run()

    def open_loop(self, requests: Iterator[tuple[float, Request]], latency: LatencyTargets) -> None:
        """Serve requests that arrive at given times; returns when all have ended."""
        self._latency = latency
        for arrival, request in requests:
            self._at(self.now + arrival, lambda request=request: self._send(request))  # type: ignore[misc]
        self._run()

    # --- clients --------------------------------------------------------------------------------------------------

    def _send_next(self) -> None:
        request = next(self._next, None)
        if request is not None:
            self._send(request)

    def _send(self, request: Request) -> None:
        assert isinstance(request.prompt, list), "simulated replicas know tokens only"
        request_id = f"r{next(self._ids)}"
        sampling = SamplingParams(max_tokens=request.output_len, temperature=0.0)
        engine_request = EngineRequest(
            request_id=request_id, prompt=request.prompt, sampling=sampling, latency=self._latency
        )
        outcome = Outcome(
            prompt_len=len(request.prompt), scheduled=self.now, sent=self.now, wanted_len=request.output_len
        )
        self.outcomes.append(outcome)
        index = self._chooser.choose(engine_request)
        self._open[request_id] = (outcome, index)
        self._at(self.now + NETWORK_SECONDS, lambda: self._arrive(engine_request, self.replicas[index]))

    # --- replicas -------------------------------------------------------------------------------------------------

    def _arrive(self, request: EngineRequest, replica: SimulatedReplica) -> None:
        replica.scheduler.add(request)
        replica.accepted.append(request.request_id)
        self._chooser.arrived(request.request_id, replica.index)
        replica.fill()
        self._go_on(replica)
        self._publish(replica)

    def _go_on(self, replica: SimulatedReplica) -> None:
        if not replica.running and replica.plans:
            replica.running = True
            self._at(self.now + replica.plans[0][1], lambda: self._end_step(replica))

    def _end_step(self, replica: SimulatedReplica) -> None:
        replica.running = False
        plan, result, seconds = replica.result()
        replica.scheduler.pace.step_ended(seconds, sum(plan.counts[plan.decode_rows :]), plan.decode_rows)
        outputs = replica.scheduler.update(result)
        replica.fill()
        self._go_on(replica)
        for output in outputs:
            outcome, index = self._open[output.request_id]
            if not outcome.token_times:
                self._chooser.started(output.request_id)
            outcome.token_times.append(self.now)
            outcome.cached_tokens = outcome.cached_tokens or output.cached_tokens
            if output.finish_reason is not None:
                del self._open[output.request_id]
                outcome.finished, outcome.error = self.now, None
                outcome.output_len, outcome.counted_by_usage = len(outcome.token_times), True
                self._chooser.ended(output.request_id, index)
                self._send_next()
        self._publish(replica)

    def _publish(self, replica: SimulatedReplica) -> None:
        if not replica.report_due:
            replica.report_due = True
            self._at(max(self.now, replica.next_report), lambda: self._report(replica))

    def _report(self, replica: SimulatedReplica) -> None:
        replica.report_due = False
        replica.next_report = self.now + REPORT_SECONDS
        stored, evicted = replica.scheduler.kv.pool.drain_events()
        load, accepted = replica.scheduler.load(), replica.accepted
        replica.accepted = []
        arguments = (replica.index, load, short_hashes(stored).tolist(), short_hashes(evicted).tolist(), accepted)
        self._at(self.now + NETWORK_SECONDS, lambda: self._chooser.report(*arguments))

    # --- time -----------------------------------------------------------------------------------------------------

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), action))

    def _run(self) -> None:
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()
        assert not self._open, f"{len(self._open)} requests were never answered"
        for replica in self.replicas:
            assert replica.scheduler.kv.pool.num_held == 0, f"replica {replica.index} holds blocks"
