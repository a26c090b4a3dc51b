"""Lengths follow the distribution that was asked for."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest

from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.bench.lengths import parse_lengths

COUNT = 20_000


def draw(text: str, longest: int | None = None, seed: int = 0) -> list[int]:
    lengths, rng = parse_lengths(text, longest=longest), random.Random(seed)
    return [lengths(rng) for _ in range(COUNT)]


def test_fixed() -> None:
    assert set(draw("128")) == {128}


def test_uniform_reaches_both_ends() -> None:
    assert set(draw("uniform:3:6")) == {3, 4, 5, 6}


def test_normal() -> None:
    lengths = draw("normal:500:50")
    assert statistics.mean(lengths) == pytest.approx(500, rel=0.01)
    assert statistics.stdev(lengths) == pytest.approx(50, rel=0.05)


def test_lognormal_has_the_given_mean_and_log_deviation() -> None:
    lengths = draw("lognormal:800:0.7")
    assert statistics.mean(lengths) == pytest.approx(800, rel=0.03)
    assert np.log(lengths).std() == pytest.approx(0.7, rel=0.03)


def test_exponential() -> None:
    assert statistics.mean(draw("exponential:300")) == pytest.approx(300, rel=0.03)


def test_choice() -> None:
    assert set(draw("choice:16:64:1024")) == {16, 64, 1024}


def test_lengths_are_at_least_one_and_at_most_the_longest() -> None:
    lengths = draw("normal:5:20", longest=30)
    assert (min(lengths), max(lengths)) == (1, 30)


def test_the_seed_decides() -> None:
    assert draw("exponential:50", seed=1) == draw("exponential:50", seed=1) != draw("exponential:50", seed=2)


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "-5", "1.5", "nan", "inf", "many", "128:", "fixed", "zipf:1", "uniform:5", "uniform:6:5"),
        *("uniform:0:5", "uniform:1.5:3", "normal:0:1", "normal:5:-1", "lognormal:5", "exponential:0", "choice:"),
    ],
)
def test_what_is_no_length_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--prompt .*uniform:LOW:HIGH"):
        parse_lengths(text, "--prompt")
