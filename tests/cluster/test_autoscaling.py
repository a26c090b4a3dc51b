"""How many replicas there should be: the rules one by one, and a recorded load against simulated replicas."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from raytroupe.cluster.autoscaling import Observation, ScalingRules, ScalingState, decide
from raytroupe.cluster.latency_class import BATCH, DEFAULT_TARGETS, INTERACTIVE
from raytroupe.cluster.queue_time import first_token_seconds, queue_seconds
from raytroupe.cluster.replica_report import ReplicaLoad, StepCurve
from raytroupe.cluster.utilisation import UtilisationMeter

RULES = ScalingRules({name: targets.ttft for name, targets in DEFAULT_TARGETS.items()})
SETTLED = ScalingState(since=-1000.0)
"""Observed for long, and nothing noted that keeps replicas alive."""


def number(
    *,
    target: int,
    ready: int | None = None,
    waits: list[float] | None = None,
    utilisation: list[float] | None = None,
    name: str = INTERACTIVE,
    most: int = 10,
    now: float = 0.0,
    state: ScalingState = SETTLED,
) -> int:
    ready = target if ready is None else ready
    utilisation = [0.7] * ready if utilisation is None else utilisation
    seen = Observation(now, target, ready, {name: waits or []}, utilisation)
    return decide(seen, 1, most, RULES, state)[0]


# --- up ---------------------------------------------------------------------------------------------------------------


def test_queued_seconds_are_divided_by_what_a_replica_may_have() -> None:
    assert number(target=3, waits=[0.6, 0.9, 0.6]) == 5  # 2.1 s, and 0.5 s may wait at each
    assert number(target=3, waits=[0.5, 0.5, 0.5]) == 3


def test_every_class_has_its_own_target() -> None:
    assert number(target=1, waits=[2.4], name="default") == 1
    assert number(target=1, waits=[2.6], name="default") == 2
    assert number(target=1, waits=[299.0], name=BATCH) == 1
    assert number(target=3, waits=[500.0] * 3, name=BATCH) == 5


def test_one_replica_with_a_long_queue_is_no_reason_for_more() -> None:
    assert number(target=3, waits=[60.0, 0.0, 0.1]) == 3
    assert number(target=2, waits=[60.0, 0.4]) == 2


def test_at_most_twice_as_many_as_are_ready() -> None:
    assert number(target=2, waits=[30.0, 30.0]) == 4
    assert number(target=4, ready=2, waits=[60.0, 60.0]) == 4
    assert number(target=4, ready=3, waits=[60.0, 60.0, 60.0]) == 6
    assert number(target=4, waits=[60.0] * 4, most=6) == 6


def test_busy_replicas_get_company_before_anybody_waits() -> None:
    assert number(target=4, utilisation=[0.95, 0.9, 0.85, 0.9]) == 5
    assert number(target=4, utilisation=[0.8] * 4) == 4
    assert number(target=1, utilisation=[30.0]) == 2  # one long prompt, counted at once


# --- down -------------------------------------------------------------------------------------------------------------


def test_the_number_falls_to_what_was_enough_for_a_while() -> None:
    state, target, history = ScalingState(), 4, []
    for second in range(100):
        busy = 0.45 if second == 30 else 0.25  # 3 replicas were needed at 30 s, else 2
        target, state = decide(Observation(float(second), target, target, {}, [busy] * 4), 1, 10, RULES, state)
        history.append(target)
    assert history[:60] == [4] * 60
    assert history[60:90] == [3] * 30
    assert history[90:] == [2] * 10
    assert len(state.notes) <= 4


def test_waiting_work_must_fit_too() -> None:
    assert number(target=4, waits=[0.3] * 4, utilisation=[0.1] * 4) == 3  # 1.2 s, and 0.5 s may wait at each
    assert number(target=4, waits=[0.0] * 4, utilisation=[0.1] * 4) == 1


def test_bounds_hold_whatever_is_seen() -> None:
    seen = Observation(0.0, 7, 7, {INTERACTIVE: [0.0] * 7}, [0.0] * 7)
    assert decide(seen, 2, 5, RULES, ScalingState())[0] == 5
    assert decide(seen, 2, 5, RULES, SETTLED)[0] == 2
    assert decide(seen, 9, 9, RULES, SETTLED)[0] == 9


def test_without_reports_the_number_stays() -> None:
    assert number(target=3, waits=[], utilisation=[]) == 3


def test_silent_replicas_count_as_full() -> None:
    assert number(target=4, utilisation=[0.0, 0.0]) == 4
    assert number(target=4, utilisation=[0.0, 0.0, 0.0]) == 2


def test_a_clock_that_is_set_back_starts_the_waiting_again() -> None:
    state = ScalingState(since=1000.0, notes=((1000.0, 4),))
    seen = Observation(10.0, 4, 4, {}, [0.0] * 4)
    assert decide(seen, 1, 10, RULES, state) == (4, ScalingState(10.0, ((10.0, 1),)))


# --- a recorded load --------------------------------------------------------------------------------------------------

LOAD = Path(__file__).parent / "recorded_load.json"
CURVE = StepCurve(base=0.02, prefill_token=0.0002, decode_row=0.0005)
PROMPT, OUTPUT = 600, 30
STARTING_SECONDS = 20


def make_load(seed: int) -> list[int]:
    """Arrivals per second: 5 quiet minutes, a burst of five times as much for 5, a lull of 5, and a slow rise and fall
    for 10. Poisson, with a level that drifts."""
    random = np.random.default_rng(seed)
    rise = 3 + 8 * np.sin(np.linspace(0, np.pi, 600)) ** 2
    level = np.concatenate([np.full(300, 3.0), np.full(300, 15.0), np.full(300, 0.5), rise, np.full(300, 0.5)])
    drift = np.exp(np.repeat(random.normal(0, 0.15, len(level) // 10), 10))
    return random.poisson(level * drift).tolist()


class SimulatedReplica:
    """Continuous batching with chunked prefill, one step after the other, by the curve."""

    def __init__(self, ready_at: float) -> None:
        self.ready_at = self.free_at = ready_at
        self.waiting: deque[list[int]] = deque()
        self.running: list[list[int]] = []  # [tokens of the prompt, tokens to generate] that are left
        self.computed = self.generated = 0
        self.draining = False
        self.meter = UtilisationMeter()
        self.samples: deque[tuple[dict[str, float], float]] = deque(maxlen=10)

    def load(self) -> ReplicaLoad:
        tokens = sum(left for left, _ in (*self.running, *self.waiting))
        residence = OUTPUT * CURVE.seconds(300, len(self.running))
        return ReplicaLoad(len(self.running), 0, len(self.waiting), 0, tokens, 0, 900, 1000, 64, 1024, CURVE, residence)

    def run_until(self, now: float) -> None:
        while (self.running or self.waiting) and self.free_at < now:
            budget = 1024
            rows = [sequence for sequence in self.running if not sequence[0]]
            while self.waiting and len(self.running) < 64:
                self.running.append(self.waiting.popleft())
            chunk = 0
            for sequence in self.running:
                share = min(sequence[0], budget - chunk)
                sequence[0] -= share
                chunk += share
            for sequence in rows:
                sequence[1] -= 1
            self.running = [sequence for sequence in self.running if sequence[1]]
            self.computed += chunk
            self.generated += len(rows)
            self.free_at += CURVE.seconds(chunk, len(rows))
        self.free_at = max(self.free_at, now)

    def report(self, now: float) -> None:
        load = self.load()
        busy = self.meter.measure(load, computed_tokens=self.computed, generated_tokens=self.generated, now=now)
        self.samples.append((queue_seconds(load), busy))


class Replay:
    """A load against replicas that the rules start and stop, second by second."""

    def __init__(self, arrivals: list[int], most: int) -> None:
        self.waits: list[float] = []
        """Predicted for a request that arrives then, by second."""
        self.targets: list[int] = []
        self.seconds_paid = 0
        replicas = [SimulatedReplica(0.0)]
        state = ScalingState()
        for second, count in enumerate(arrivals):
            now = float(second)
            ready = [one for one in replicas if one.ready_at <= now and not one.draining]
            for _ in range(count):
                best = min(ready, key=lambda one: first_token_seconds(one.load(), yields=False, uncached_tokens=PROMPT))
                best.waiting.append([PROMPT, OUTPUT])
            for one in replicas:
                one.run_until(now + 1)
            for one in ready:
                one.report(now + 1)
            self.waits.append(min(one.samples[-1][0][INTERACTIVE] for one in ready))
            waits = {
                name: [float(np.mean([w[name] for w, _ in one.samples])) for one in ready] for name in RULES.targets
            }
            busy = [float(np.mean([busy for _, busy in one.samples])) for one in ready]
            there = [one for one in replicas if not one.draining]
            target, state = decide(Observation(now, len(there), len(ready), waits, busy), 1, most, RULES, state)
            replicas += [SimulatedReplica(now + STARTING_SECONDS) for _ in range(target - len(there))]
            for one in sorted(there, key=lambda one: -one.ready_at)[: max(0, len(there) - target)]:
                one.draining = True
            replicas = [one for one in replicas if not one.draining or one.running or one.waiting]
            self.targets.append(target)
            self.seconds_paid += len(replicas)

    @property
    def changes(self) -> list[tuple[int, int]]:
        """(second, new number)"""
        return [(i, n) for i, n in enumerate(self.targets) if i and n != self.targets[i - 1]]


@pytest.fixture(scope="module")
def arrivals() -> list[int]:
    return json.loads(LOAD.read_text())["arrivals"]


def test_the_load_is_what_its_recipe_makes(arrivals: list[int]) -> None:
    assert arrivals == make_load(json.loads(LOAD.read_text())["seed"])


@pytest.fixture(scope="module")
def replay(arrivals: list[int]) -> Replay:
    return Replay(arrivals, most=8)


def test_waits_are_within_the_target_again_a_minute_after_a_burst(replay: Replay) -> None:
    late = [second for second, wait in enumerate(replay.waits) if wait > RULES.targets[INTERACTIVE]]
    assert 300 <= late[0] <= 305
    assert late[-1] < 360  # three times what a replica takes to start; the slow rise later is met in time


def test_replicas_go_when_the_burst_has_gone(replay: Replay) -> None:
    assert replay.targets[299] == 1
    assert max(replay.targets) > 3
    assert replay.targets[720] == 1  # two minutes into the lull
    assert replay.targets[-1] == 1
    assert replay.seconds_paid < 0.4 * max(replay.targets) * len(replay.targets)


def test_the_number_does_not_flap(replay: Replay) -> None:
    assert len(replay.changes) <= 16
    ups = [second for second, new in replay.changes if new > replay.targets[second - 1]]
    downs = [second for second, new in replay.changes if new < replay.targets[second - 1]]
    # Two waves: all replicas start before any stops, and the other way round.
    turns = sum((a in ups) != (b in ups) for a, b in zip(sorted(ups + downs), sorted(ups + downs)[1:], strict=False))
    assert turns == 3


def test_one_replica_would_not_have_been_enough(arrivals: list[int]) -> None:
    waits = Replay(arrivals[:600], most=1).waits
    assert max(waits) > 100


@pytest.mark.parametrize("rate", [3, 4, 5, 8, 10])
def test_a_steady_load_gets_a_steady_number(rate: int) -> None:
    steady = Replay(np.random.default_rng(1).poisson(rate, 600).tolist(), most=8)
    assert len(steady.changes) <= 3
    assert max(steady.waits[120:]) <= RULES.targets[INTERACTIVE]
