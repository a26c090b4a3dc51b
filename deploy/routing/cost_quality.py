"""What a threshold would cost and keep: every question goes to the cheapest model that is probable enough, against the
best model alone and against choosing at random."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import msgspec
import numpy as np

from ...router.classifier import CurvePoint

RESAMPLES = 2000
POINTS = 200
"""Of a curve at most."""


class Estimate(msgspec.Struct, frozen=True):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class RoutePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One threshold. Quality is right answers as a share of the best model's; cost a share of its cost."""

    threshold: float
    shares: list[float]
    """Of the questions, to every model."""
    quality: Estimate
    cost: Estimate
    mixture_quality: Estimate
    """Of the best random choice of models that costs as much."""
    saved: Estimate
    """Share saved of what the cheapest random choice of the same quality costs; where no random choice is that good, of
    what the best model costs."""

    def for_file(self) -> CurvePoint:
        """What serving needs of it."""
        return CurvePoint(
            threshold=round(self.threshold, 4),
            quality=round(self.quality.value, 5),
            quality_low=round(self.quality.low, 5),
            cost=round(self.cost.value, 5),
        )


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What every model answered, and what was predicted of it. Arrays are [questions, models], cheapest model first."""

    right: np.ndarray
    cost: np.ndarray
    """Dollars."""
    probability: np.ndarray
    """Of not being worse than the best model, which has 1."""
    best: int
    groups: Sequence[Hashable]
    """Equal for the same question, which is resampled as one."""

    def thresholds(self) -> list[float]:
        """Those worth a point: between the predicted probabilities, and 1, with which the best model answers alone."""
        cheaper = np.delete(self.probability, np.s_[self.best :], axis=1)
        if cheaper.size == 0:
            return [1.0]
        at = np.quantile(cheaper, np.linspace(0, 1, POINTS - 1), method="higher")
        return sorted({*(np.floor(at * 1e4) / 1e4).tolist(), 1.0})

    def chosen(self, threshold: float) -> np.ndarray:
        """The model that answers every question [questions]; what is dearer than the best one never does."""
        probable = self.probability[:, : self.best + 1] >= threshold
        probable[:, self.best] = True
        return probable.argmax(axis=1)


def curve(outcomes: Outcomes, thresholds: Sequence[float], seed: int) -> list[RoutePoint]:
    """A point for every threshold, with intervals from `RESAMPLES` resamplings of the questions (percentiles; Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13)."""
    places: dict[Hashable, int] = {}
    questions = np.array([places.setdefault(group, len(places)) for group in outcomes.groups])
    count = len(places)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, count)), drawn])  # the first row is the sample itself

    def totals(values: np.ndarray) -> np.ndarray:
        return weights @ np.bincount(questions, values.astype(float), minlength=count)

    models = range(outcomes.right.shape[1])
    right = np.stack([totals(outcomes.right[:, model]) for model in models], axis=1)
    cost = np.stack([totals(outcomes.cost[:, model]) for model in models], axis=1)
    quality_of = right / np.maximum(right[:, [outcomes.best]], 1e-9)
    cost_of = cost / cost[:, [outcomes.best]]
    points = []
    for threshold in thresholds:
        chosen = outcomes.chosen(threshold)
        rows = np.arange(len(chosen))
        quality = totals(outcomes.right[rows, chosen]) / np.maximum(right[:, outcomes.best], 1e-9)
        spent = totals(outcomes.cost[rows, chosen]) / cost[:, outcomes.best]
        points.append(
            RoutePoint(
                threshold=threshold,
                shares=[float(np.mean(chosen == model)) for model in models],
                quality=_estimate(quality),
                cost=_estimate(spent),
                mixture_quality=_estimate(best_at_random(cost_of, quality_of, spent)),
                saved=_estimate(1 - spent / cheapest_at_random(cost_of, quality_of, quality)),
            )
        )
    return points


def best_at_random(cost: np.ndarray, quality: np.ndarray, spent: np.ndarray) -> np.ndarray:
    """The highest quality of a random choice between two models that costs `spent` at most.

    Args:
        cost: of every model [samples, models]; so is `quality`.
        spent: [samples].
    """
    found = np.where(cost <= spent[:, None] * (1 + 1e-9), quality, -np.inf).max(axis=1)
    for cheap in range(cost.shape[1]):
        for dear in range(cost.shape[1]):
            part = _part(cost[:, cheap], cost[:, dear], spent)
            found = np.fmax(found, quality[:, cheap] + part * (quality[:, dear] - quality[:, cheap]))
    return found


def cheapest_at_random(cost: np.ndarray, quality: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The lowest cost of a random choice between two models that has the quality `wanted`, or, where that is more than
    any model has, the highest quality there is. Arguments as above."""
    wanted = np.minimum(wanted, quality.max(axis=1))
    found = np.where(quality >= wanted[:, None] - 1e-9, cost, np.inf).min(axis=1)
    for bad in range(cost.shape[1]):
        for good in range(cost.shape[1]):
            part = _part(quality[:, bad], quality[:, good], wanted)
            found = np.fmin(found, cost[:, bad] + part * (cost[:, good] - cost[:, bad]))
    return found


def _part(low: np.ndarray, high: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Where value lies between low and high, 0 to 1; NaN if it does not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (value - low) / (high - low)
    return np.where((part >= 0) & (part <= 1) & (high > low), part, np.nan)


def _estimate(samples: np.ndarray) -> Estimate:
    low, high = np.percentile(samples[1:], [2.5, 97.5])
    return Estimate(float(samples[0]), float(low), float(high))


class Calibration(msgspec.Struct, frozen=True):
    """How well probabilities say what happens."""

    brier: float
    """Mean squared error of the probabilities."""
    base_brier: float
    """That of saying the mean every time."""
    expected_error: float
    """Expected calibration error: |mean probability - share that happened|, weighted over ten bins of equally many."""


def calibration(probability: np.ndarray, happened: np.ndarray) -> Calibration:
    """Of one model's probabilities [questions]."""
    happened = happened.astype(float)
    order = np.argsort(probability, kind="stable")
    bins = [places for places in np.array_split(order, 10) if len(places)]
    error = sum(abs(probability[places].mean() - happened[places].mean()) * len(places) for places in bins)
    mean = happened.mean()
    return Calibration(
        float(np.mean((probability - happened) ** 2)), float(mean * (1 - mean)), float(error / len(happened))
    )
