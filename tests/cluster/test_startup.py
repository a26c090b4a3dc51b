"""The phases of a start: counted once each, and a line whose parts add up to its sum."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytroupe.cluster.startup import PHASES, StartupClock, describe_startup, slowest


def test_a_phase_lasts_as_long_as_its_block_and_goes_on_counting() -> None:
    clock = StartupClock()
    began = time.perf_counter()
    with clock.phase("weights"):
        time.sleep(0.01)
    first = clock.seconds["weights"]
    with pytest.raises(ValueError, match="broken"), clock.phase("weights"):
        raise ValueError("broken")
    with clock.phase("profile"):
        pass
    elapsed = time.perf_counter() - began
    assert list(clock.seconds) == ["weights", "profile"]
    assert 0.01 <= first < clock.seconds["weights"]
    assert sum(clock.seconds.values()) <= elapsed


def test_a_phase_that_nobody_knows_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="lunch"), StartupClock().phase("lunch"):
        pass


def test_the_slowest_shard_counts_and_nobody_is_blamed_for_waiting() -> None:
    """Shard 1 imports for longer; shard 0 spends the difference in `connect`."""
    shards = [
        {"imports": 1.0, "connect": 2.5, "weights": 4.0, "warm-up": 0.5},
        {"imports": 3.0, "connect": 0.5, "weights": 3.0, "profile": 0.25, "warm-up": 0.5},
    ]
    seconds = slowest([{"process": 1.5}, *shards])
    expected = {"process": 1.5, "imports": 3.0, "connect": 0.5, "weights": 4.0, "profile": 0.25, "warm-up": 0.5}
    assert seconds == expected
    assert list(seconds) == list(expected)


def test_the_line() -> None:
    seconds = {"warm-up": 1.04, "imports": 3.9, "weights": 2.0, "kernels": 0.04}
    assert (
        describe_startup(seconds, elapsed=8.0) == "start-up: 8.0 s = imports 3.9 + weights 2.0 + warm-up 1.0 + rest 1.1"
    )
    assert describe_startup(seconds, elapsed=6.0) == "start-up: 6.9 s = imports 3.9 + weights 2.0 + warm-up 1.0"
    assert describe_startup({"weights": 0.01}, elapsed=0.02) == "start-up: 0.0 s"


@given(
    seconds=st.dictionaries(st.sampled_from(PHASES), st.floats(0, 1000)),
    elapsed=st.floats(0, 5000),
)
def test_the_parts_add_up_to_the_sum_and_the_sum_to_what_passed(seconds: dict[str, float], elapsed: float) -> None:
    line = describe_startup(seconds, elapsed)
    total, *parts = [round(10 * float(figure)) for figure in re.findall(r"\d+\.\d", line)]
    assert total == sum(parts)
    assert total >= round(10 * elapsed)
    assert total <= max(round(10 * elapsed), sum(round(10 * value) for value in seconds.values()))
    assert ("rest" in line) == (total > sum(round(10 * value) for value in seconds.values()))
