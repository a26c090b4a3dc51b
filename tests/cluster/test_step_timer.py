"""Step times are learned from noisy steps, and what the steps do not tell is not made up."""

from __future__ import annotations

import random

import msgspec
import pytest

from raytroupe.cluster.replica_report import StepCurve
from raytroupe.cluster.step_timer import FORGETTING, SOLVE_EVERY, StepTimer

CURVE = StepCurve(3e-3, 1.5e-4, 2e-4)


def mixed_steps(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """(tokens of prompts, sequences that decode)"""
    rng = random.Random(seed)
    return [(rng.choice([0, 0, 0, 60, 500]), rng.randrange(1, 40)) for _ in range(count)]


def assert_close(curve: StepCurve | None, expected: StepCurve = CURVE, within: float = 0.05) -> None:
    assert curve is not None
    assert msgspec.structs.astuple(curve) == pytest.approx(msgspec.structs.astuple(expected), rel=within)


def test_there_is_no_curve_before_some_steps():
    timer = StepTimer()
    for _ in range(SOLVE_EVERY - 1):
        timer.observe(0.01, 10, 2)
    assert timer.curve is None


def test_a_known_curve_is_recovered_from_noisy_steps():
    timer, rng = StepTimer(), random.Random(1)
    for step in mixed_steps(400):
        timer.observe(CURVE.seconds(*step) * rng.uniform(0.9, 1.1), *step)
    assert_close(timer.curve)


def test_steps_in_which_something_else_took_the_time_do_not_count():
    timer = StepTimer()
    timer.observe(20.0, 512, 0)  # the kernels were compiled
    for index, step in enumerate(mixed_steps(200)):
        timer.observe(CURVE.seconds(*step) + (1.0 if index % 20 == 19 else 0.0), *step)
    assert_close(timer.curve)


def test_results_that_are_read_at_once_do_not_make_steps_free():
    timer = StepTimer()
    for index, step in enumerate(mixed_steps(400)):
        timer.observe(0.0 if index % 50 == 49 else CURVE.seconds(*step), *step)
    for step in [(0, 4), (0, 30), (500, 10)]:
        assert timer.curve.seconds(*step) == pytest.approx(CURVE.seconds(*step), rel=0.1)


@pytest.mark.parametrize("step", [(512, 0), (0, 8), (300, 7)])
def test_one_kind_of_step_is_predicted_and_no_part_is_negative(step):
    timer = StepTimer()
    for _ in range(64):
        timer.observe(CURVE.seconds(*step), *step)
    curve = timer.curve
    assert curve.seconds(*step) == pytest.approx(CURVE.seconds(*step), rel=0.01)
    assert min(curve.base, curve.prefill_token, curve.decode_row) >= 0
    assert curve.prefill_token > 0
    assert curve.decode_row > 0 or step == (300, 7)


def test_collinear_steps_are_predicted():
    timer = StepTimer()
    for rows in [1, 5, 9, 30] * 40:
        timer.observe(CURVE.seconds(10 * rows, rows), 10 * rows, rows)
    for rows in (2, 20):
        assert timer.curve.seconds(10 * rows, rows) == pytest.approx(CURVE.seconds(10 * rows, rows), rel=0.02)


def test_what_has_not_come_for_long_is_remembered():
    timer = StepTimer()
    for step in mixed_steps(100):
        timer.observe(CURVE.seconds(*step), *step)
    assert FORGETTING**100_000 == 0
    for _ in range(100_000):
        timer.observe(CURVE.seconds(0, 8), 0, 8)
    assert_close(timer.curve)


def test_a_change_is_followed():
    timer, slower = StepTimer(), StepCurve(6e-3, 3e-4, 4e-4)
    for curve in (CURVE, slower):
        for step in mixed_steps(600):
            timer.observe(curve.seconds(*step), *step)
    assert_close(timer.curve, slower)
