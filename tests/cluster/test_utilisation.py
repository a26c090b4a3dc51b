"""How busy a replica is, from its load and what it has computed."""

from __future__ import annotations

import pytest

from raytroupe.cluster.replica_report import ReplicaLoad, StepCurve
from raytroupe.cluster.utilisation import UtilisationMeter

# The longest step takes 0.01 + 90 · 0.0005 + 9 · 0.005 = 0.1 s, so 0.9 of a second can be marginal time.
CURVE = StepCurve(base=0.01, prefill_token=0.0005, decode_row=0.005)


def load(running: int = 0, of_batch: int = 0, free_blocks: int = 1000, curve: StepCurve | None = CURVE) -> ReplicaLoad:
    return ReplicaLoad(running, of_batch, 0, 0, 0, 0, free_blocks, 1000, 9, 90, curve, 1.0)


def measure(seen: ReplicaLoad, *, computed: int = 0, generated: int = 0) -> float:
    """Over ten seconds in which so much was done."""
    meter = UtilisationMeter()
    meter.measure(seen, computed_tokens=7, generated_tokens=7, now=100.0)
    return meter.measure(seen, computed_tokens=7 + computed, generated_tokens=7 + generated, now=110.0)


def test_time_is_measured_in_tokens() -> None:
    assert measure(load(1), computed=9000) == pytest.approx(9000 * 0.0005 / 10 / 0.9)
    assert measure(load(1), computed=9000, generated=450) == pytest.approx((4.5 + 2.25) / 10 / 0.9)


def test_a_lone_sequence_does_not_fill_a_replica() -> None:
    # One row in every step of 0.015 s: the engine is never idle, and a third of its time grows with the work.
    assert measure(load(1), generated=667) == pytest.approx(0.333 / 0.9, rel=0.01)


def test_what_is_scarcest_counts() -> None:
    assert measure(load(6)) == pytest.approx(6 / 9)
    assert measure(load(1, free_blocks=100)) == pytest.approx(0.9)
    assert measure(load(0, free_blocks=100)) == 0


def test_batch_does_not_count() -> None:
    assert measure(load(9, of_batch=9, free_blocks=0), computed=18000) == 0
    assert measure(load(8, of_batch=6, free_blocks=0), computed=18000) == pytest.approx(0.25)


def test_without_a_curve_or_a_past_slots_and_blocks_count() -> None:
    assert measure(load(3, curve=None), computed=9000) == pytest.approx(3 / 9)
    assert UtilisationMeter().measure(load(3), computed_tokens=9000, generated_tokens=0, now=0.0) == pytest.approx(
        3 / 9
    )


def test_what_is_left_over_after_a_request_has_ended_is_still_of_its_class() -> None:
    meter = UtilisationMeter()
    meter.measure(load(1), computed_tokens=0, generated_tokens=0, now=0.0)
    assert meter.measure(load(0), computed_tokens=900, generated_tokens=0, now=1.0) == pytest.approx(0.5)
