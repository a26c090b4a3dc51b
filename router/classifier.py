"""How probable it is that a cheaper model's answer will do, from features of the prompt.

What is predicted for a model is that its answer is *not worse than the best model's*: it is right, or the best one is
wrong. That is what a quality target is about: `quality` 0.99 means that 0.99 of what the best model answers right
stays right, so a request that neither can answer may go to the cheaper one, and the best model has probability 1 by
definition.

`troupe router fit` (`deploy/routing/`) writes the file: logistic regression with its calibration (Platt scaling) folded
into the weights, the cost–quality curve, and how familiar a prompt has to be. Of a prompt that looks like none of those
that it was fitted on it cannot tell anything: all models but the best then have probability 0. Nothing here needs
scikit-learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..cluster.errors import ConfigError
from .prompt_features import COUNTS, SIZES, VERSION, PromptFacts, prompt_features

ALMOST = 0.99999
"""The highest probability of a model that is not the best."""


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """What would have come of one threshold on the questions of the fit, none predicted from itself."""

    threshold: float
    quality: float
    """Right answers, as a share of the best model's."""
    quality_low: float
    """Lower end of its 95 % interval."""
    cost: float
    """As a share of what the best model alone costs."""


class ModelWeights(msgspec.Struct, kw_only=True):
    """One model's regression: log odds = intercept + Σ counts + Σ phrases."""

    intercept: float
    counts: list[float]
    """In the order of `COUNTS`."""
    phrases: list[float]
    """In the order of the vocabulary."""


class TokenCosts(msgspec.Struct, frozen=True):
    """Dollars per token that the fit reckoned with."""

    prompt: float
    output: float
    estimated: bool = False


class ClassifierFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What stands in the file."""

    features: int
    """`VERSION` of the features."""
    best: str
    """The model that the others are compared with."""
    accuracy: dict[str, float]
    """Share of right answers of every model, cheapest first."""
    prices: dict[str, TokenCosts]
    vocabulary: list[int]
    """Numbers of the phrases that have weights."""
    models: dict[str, ModelWeights]
    """Of all but the best."""
    largest: list[float]
    """Of every size in `SIZES`, the largest that is familiar."""
    known: float
    """Share of a prompt's phrases that must be in the vocabulary for it to be familiar."""
    curve: list[CurvePoint]
    """By rising threshold."""
    about: dict[str, str] = {}
    """How it was fitted, for people."""


class Classifier:
    """A fitted classifier."""

    def __init__(self, file: ClassifierFile) -> None:
        self.best = file.best
        self.models = list(file.accuracy)
        """Names of all, cheapest first."""
        self.file = file
        cheaper = [(name, file.models[name]) for name in self.models if name != file.best]
        self._names = [name for name, _ in cheaper]
        self._start = [weights.intercept for _, weights in cheaper]
        self._counts = [weights.counts for _, weights in cheaper]
        rows = zip(*(weights.phrases for _, weights in cheaper), strict=True)
        self._phrases = dict(zip(file.vocabulary, rows, strict=True)) if cheaper else {}

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """Read a file of `troupe router fit`. Raises ConfigError if there is none or it is damaged."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"the classifier {path} cannot be read: {error.strerror}; write one with `troupe router fit`"
            ) from None
        return cls.from_json(content, str(path))

    @classmethod
    def from_json(cls, content: bytes, name: str = "the classifier") -> Classifier:
        """Check a file's content, all of it, so that nothing can fail when a request comes.

        Raises:
            ConfigError: names the file `name` and what is wrong with it.
        """
        try:
            file = msgspec.json.decode(content, type=ClassifierFile)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{name} is no classifier: {error}; write it anew with `troupe router fit`") from None
        if fault := _fault(file):
            raise ConfigError(f"{name} is no classifier: {fault}; write it anew with `troupe router fit`")
        return cls(file)

    def probabilities(self, facts: PromptFacts) -> dict[str, float]:
        """For every model the probability that its answer is not worse than the best model's.

        Prompts with tools, or that must be answered in JSON of a given form, are never familiar: there are none among
        questions with exact answers.
        """
        found = dict.fromkeys(self._names, 0.0)
        if found and not (facts.tools or facts.json_schema):
            features = prompt_features(facts)
            sizes = zip(features.counts, self.file.largest, strict=False)
            rows = [row for phrase in features.phrases if (row := self._phrases.get(phrase)) is not None]
            if len(rows) >= self.file.known * len(features.phrases) and all(size <= limit for size, limit in sizes):
                for place, name in enumerate(self._names):
                    odds = self._start[place] + sum(map(float.__mul__, features.counts, self._counts[place]))
                    found[name] = min(sigmoid(odds + sum([row[place] for row in rows])), ALMOST)
        found[self.best] = 1.0
        return found

    def threshold(self, quality: float) -> float:
        """The probability from which on a cheaper model may answer, so that `quality` of what the best model answers
        right stays right: that of the cheapest point of the curve whose quality is at least as high with all of its
        95 % interval. So a small fit promises little, and the choice among many points does not make it look better
        than it is. 1 if there is no such point: then only the best model answers.
        """
        good = [point for point in self.file.curve if point.quality_low >= quality]
        return min(good, key=lambda point: (point.cost, -point.threshold)).threshold if good else 1.0


def sigmoid(odds: float) -> float:
    """1 / (1 + exp(-odds)), for all numbers."""
    if odds >= 0:
        return 1 / (1 + math.exp(-odds))
    power = math.exp(odds) if odds > -700 else 0.0
    return power / (1 + power)


def _fault(file: ClassifierFile) -> str | None:
    """What is wrong with a file of the right form."""
    if file.features != VERSION:
        return f"it was fitted on features of version {file.features}, and these are of version {VERSION}"
    names = set(file.accuracy)
    if file.best not in names:
        return f"the best model {file.best!r} is none of {', '.join(file.accuracy)}"
    if set(file.prices) != names or set(file.models) != names - {file.best}:
        return "accuracy, prices and models do not name the same models"
    if len(set(file.vocabulary)) != len(file.vocabulary):
        return "a phrase stands in the vocabulary twice"
    if any(not 0 <= phrase < 1 << 32 for phrase in file.vocabulary):
        return "a phrase's number has more than 32 bits"
    if len(file.largest) != len(SIZES):
        return f"largest has {len(file.largest)} numbers instead of {len(SIZES)}"
    for name, weights in file.models.items():
        if len(weights.counts) != len(COUNTS):
            return f"{name} has {len(weights.counts)} weights of counts instead of {len(COUNTS)}"
        if len(weights.phrases) != len(file.vocabulary):
            return f"{name} has {len(weights.phrases)} weights of phrases for {len(file.vocabulary)} phrases"
        if not _finite([weights.intercept, *weights.counts, *weights.phrases]):
            return f"{name} has a weight that is not finite"
    for cost in file.prices.values():
        if not _finite([cost.prompt, cost.output]) or min(cost.prompt, cost.output) < 0:
            return "a price is negative or not finite"
    points = [[point.threshold, point.quality, point.quality_low, point.cost] for point in file.curve]
    if not _finite([*file.largest, file.known, *file.accuracy.values(), *(number for row in points for number in row)]):
        return "a number is not finite"
    if any(not 0 <= row[0] <= 1 for row in points):
        return "a threshold of the curve is no probability"
    return None


def _finite(numbers: Sequence[float]) -> bool:
    return all(map(math.isfinite, numbers))
