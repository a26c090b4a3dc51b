"""Lengths in tokens: fixed, or drawn from a distribution that is written as `NAME:PARAMETER:…`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from ...cluster.errors import ConfigError

FORMS = (
    "128",
    "uniform:LOW:HIGH",
    "normal:MEAN:DEVIATION",
    "lognormal:MEAN:SIGMA",
    "exponential:MEAN",
    "choice:A:B:…",
)
"""Ways to write a length. `lognormal` has the mean of the lengths and the deviation of their logarithm."""

Draw = Callable[[random.Random], float]


class Lengths:
    """A distribution of lengths; every length is at least 1 and at most `longest`."""

    def __init__(self, text: str, draw: Draw, longest: int | None) -> None:
        self.text = text
        self._draw = draw
        self._longest = longest

    def __call__(self, rng: random.Random) -> int:
        """One length in tokens."""
        length = max(1, round(self._draw(rng)))
        return length if self._longest is None else min(length, self._longest)


def parse_lengths(text: str, option: str = "length", longest: int | None = None) -> Lengths:
    """`text` in one of `FORMS`; `option` is what the user calls it. Longer draws than `longest` become `longest`.

    Raises:
        ConfigError: not of these forms, or a parameter that makes no sense.
    """
    name, *rest = text.split(":")
    if not rest:
        name, rest = "fixed", [name]
    try:
        parameters = [float(part) for part in rest]
        if not all(map(math.isfinite, parameters)):
            raise ValueError
        return Lengths(text, _DISTRIBUTIONS[name](*parameters), longest)
    except (KeyError, ValueError, TypeError):
        raise ConfigError(
            f"{option} {text!r}: lengths are whole numbers from 1 on; write one of {', '.join(FORMS)}"
        ) from None


def _fixed(length: float) -> Draw:
    if length < 1 or length != int(length):
        raise ValueError
    return lambda rng: length


def _uniform(low: float, high: float) -> Draw:
    if not (1 <= low <= high and low == int(low) and high == int(high)):
        raise ValueError
    return lambda rng: rng.randint(int(low), int(high))


def _normal(mean: float, deviation: float) -> Draw:
    if mean < 1 or deviation < 0:
        raise ValueError
    return lambda rng: rng.normalvariate(mean, deviation)


def _lognormal(mean: float, sigma: float) -> Draw:
    if mean < 1 or sigma < 0:
        raise ValueError
    mu = math.log(mean) - sigma * sigma / 2  # the mean of a lognormal distribution is exp(mu + sigma²/2)
    return lambda rng: rng.lognormvariate(mu, sigma)


def _exponential(mean: float) -> Draw:
    if mean < 1:
        raise ValueError
    return lambda rng: rng.expovariate(1 / mean)


def _choice(*lengths: float) -> Draw:
    for length in lengths:
        _fixed(length)
    return lambda rng: rng.choice(lengths)


_DISTRIBUTIONS: dict[str, Callable[..., Draw]] = {
    "fixed": _fixed,
    "uniform": _uniform,
    "normal": _normal,
    "lognormal": _lognormal,
    "exponential": _exponential,
    "choice": _choice,
}
