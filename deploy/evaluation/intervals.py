"""Confidence intervals, two-sided unless said otherwise. `z` is the normal quantile that says how confident: 1.96 for
95 %."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

Z_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


def quantile(tail: float) -> float:
    """z with probability `tail` above it."""
    return NormalDist().inv_cdf(1 - tail)


def wilson(right: int, items: int, z: float = Z_95) -> tuple[float, float]:
    """Of a proportion: Wilson's score interval (doi:10.1080/01621459.1927.10502953)."""
    n, p, z2 = items, right / items, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(lost: float, gained: float, items: float, z: float = Z_95) -> tuple[float, float]:
    """Of the share that is lost between two measurements of the same items: Tango's score interval (Statistics in
    Medicine 17, 1998, 891–908).

    It inverts the score test of a given difference, which for a difference of 0 is McNemar's test, and keeps its
    coverage where few items or none changed.

    Args:
        lost: items that were right in the first measurement only.
        gained: items that were right in the second only.
        items: all; the counts may be scaled, so none has to be whole.
    """
    observed = (lost - gained) / items

    def score(difference: float) -> float:
        return _tango_score(difference, lost, gained, items)

    low = -1.0 if observed == -1 else _bisect(lambda d: score(d) > z, -1.0, observed)
    high = 1.0 if observed == 1 else _bisect(lambda d: score(d) > -z, observed, 1.0)
    return low, high


def _tango_score(difference: float, lost: float, gained: float, items: float) -> float:
    """How many standard errors the observed difference lies above `difference`; the error is that of the probabilities
    that make the counts likeliest among those with this difference."""
    a = 2 * items
    b = -lost - gained + (2 * items - lost + gained) * difference
    c = -gained * difference * (1 - difference)
    likeliest_gain = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = items * (2 * likeliest_gain + difference * (1 - difference))
    deviation = lost - gained - items * difference
    if variance > 0:
        return deviation / math.sqrt(variance)
    return math.copysign(math.inf, deviation) if deviation else 0.0


def _bisect(below: Callable[[float], bool], low: float, high: float) -> float:
    """Where `below` turns from true to false."""
    for _ in range(60):
        middle = (low + high) / 2
        if below(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float], z: float = Z_95) -> tuple[float, float]:
    """Of sum(numerators) / sum(denominators) over independent samples, such as the loss per token over sequences: the
    linearised variance of a ratio (Cochran, Sampling Techniques, 3rd ed. 1977, chapter 6) with Student's quantile.

    Needs two samples at least.
    """
    count, total = len(numerators), sum(denominators)
    ratio = sum(numerators) / total
    squares = sum((y - ratio * x) ** 2 for y, x in zip(numerators, denominators, strict=True))
    error = math.sqrt(squares * count / (count - 1)) / total
    half = student(z, count - 1) * error
    return ratio - half, ratio + half


def student(z: float, freedom: int) -> float:
    """Student's quantile with the tail of the normal quantile z: Abramowitz and Stegun 26.7.5, whose error is below
    0.1 % from 10 degrees of freedom on."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
