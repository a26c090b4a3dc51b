"""Fits the classifier: logistic regression per model on features of the prompts (scikit-learn), with Platt scaling.

Every question is predicted by a regression that has not seen it: the questions are divided into `FOLDS` parts, the same
question with another system prompt in the same, and each part is predicted from the others; so is its calibration. From
these predictions come the curve and its intervals, which therefore have all questions to rest on. The regression that
is written is fitted on all of them.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from ...router.classifier import ClassifierFile, ModelWeights, TokenCosts
from ...router.prompt_features import SIZES, VERSION, Features
from .cost_quality import Outcomes

FOLDS = 5
MIN_QUESTIONS = 100
STRENGTHS = (0.03, 0.1, 0.3, 1.0)
"""Tried inverses of the penalty on weights (scikit-learn's C)."""
MIN_OCCURRENCES = 3
"""Prompts that a phrase must be in to have a weight."""
UNFAMILIAR_SHARE = 0.005
"""Of the questions of the fit themselves that may pass for unfamiliar."""
ROOM = math.log(1.25)
"""A prompt a quarter longer than any in the fit is still familiar."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Questions and what the models made of them. Arrays are [questions, models], cheapest model first."""

    features: list[Features]
    right: np.ndarray
    cost: np.ndarray
    groups: Sequence[Hashable]

    @property
    def best(self) -> int:
        """The model with the most right answers; of equally good ones the cheapest."""
        return int(self.right.sum(axis=0).argmax())

    @property
    def not_worse(self) -> np.ndarray:
        """The labels: right, or the best model is wrong [questions, models]."""
        return self.right | ~self.right[:, [self.best]]


@dataclasses.dataclass(frozen=True)
class Fit:
    """What was fitted, without curve, and what it predicts of every question without having seen it."""

    file: ClassifierFile
    outcomes: Outcomes
    constant: list[str]
    """Models with too few answers of one kind to learn from."""


class Design:
    """From features to the regression's inputs; knows which phrases there are and how large counts are."""

    def __init__(self, features: Sequence[Features]) -> None:
        found = Counter(phrase for of_prompt in features for phrase in of_prompt.phrases)
        self.vocabulary = sorted(phrase for phrase, prompts in found.items() if prompts >= MIN_OCCURRENCES)
        self._place = {phrase: place for place, phrase in enumerate(self.vocabulary)}
        counts = np.array([of_prompt.counts for of_prompt in features])
        self.mean, deviation = counts.mean(axis=0), counts.std(axis=0)
        self.scale = np.where(deviation > 1e-9, deviation, np.inf)  # a count that never differs has no weight

    def matrix(self, features: Sequence[Features]) -> csr_matrix:
        """[prompts, counts + phrases], counts with mean 0 and deviation 1."""
        counts = (np.array([of_prompt.counts for of_prompt in features]) - self.mean) / self.scale
        places = [self._places(of_prompt) for of_prompt in features]
        starts = np.cumsum([0, *map(len, places)])
        columns = np.concatenate(places) if places else np.zeros(0)
        phrases = csr_matrix((np.ones(len(columns)), columns, starts), shape=(len(places), len(self.vocabulary)))
        return hstack([csr_matrix(counts), phrases]).tocsr()

    def known(self, features: Sequence[Features]) -> np.ndarray:
        """Share of every prompt's phrases that are in the vocabulary."""
        return np.array([len(self._places(of_prompt)) / len(of_prompt.phrases) for of_prompt in features])

    def _places(self, of_prompt: Features) -> list[int]:
        return [self._place[phrase] for phrase in of_prompt.phrases if phrase in self._place]

    def weights(self, intercept: float, coefficients: np.ndarray) -> ModelWeights:
        """For counts and phrases as they come, without mean and deviation."""
        counts = coefficients[: len(self.mean)] / self.scale
        return ModelWeights(
            intercept=round(float(intercept - counts @ self.mean), 5),
            counts=[round(number, 5) for number in counts.tolist()],
            phrases=[round(number, 4) for number in coefficients[len(self.mean) :].tolist()],
        )


def fit(names: Sequence[str], prices: Sequence[TokenCosts], labelled: Labelled, seed: int) -> Fit:
    """Fit a classifier for models `names`, cheapest first. The curve is still to be put into its file."""
    design = Design(labelled.features)
    folds = list(GroupKFold(FOLDS, shuffle=True, random_state=seed).split(labelled.features, groups=labelled.groups))
    designs = [Design([labelled.features[place] for place in train]) for train, _ in folds]
    known = np.zeros(len(labelled.features))
    for (_, test), of_fold in zip(folds, designs, strict=True):
        known[test] = of_fold.known([labelled.features[place] for place in test])
    limit = math.floor(float(np.quantile(known, UNFAMILIAR_SHARE)) * 1e4) / 1e4

    probability = np.ones(labelled.right.shape)
    models, constant = {}, []
    for column, name in enumerate(names):
        if column == labelled.best:
            continue
        label = labelled.not_worse[:, column]
        if min(label.sum(), (~label).sum()) < 2 * FOLDS:
            constant.append(name)
            share = (label.sum() + 1) / (len(label) + 2)  # Laplace: of what has not happened yet, a little
            odds = math.log(share / (1 - share))
            models[name] = design.weights(odds, np.zeros(len(design.mean) + len(design.vocabulary)))
            probability[:, column] = share
            continue
        matrix = design.matrix(labelled.features)
        strength, odds_unseen = _unseen(labelled.features, label, folds, designs)
        probability[:, column] = _calibrated(odds_unseen, label, folds)
        regression = _regression(strength).fit(matrix, label)
        slope, offset = _platt(odds_unseen, label)
        coefficients, intercept = regression.coef_[0], float(regression.intercept_[0])
        models[name] = design.weights(slope * intercept + offset, slope * coefficients)
    cheaper = np.arange(len(names)) != labelled.best
    probability[np.outer(known < limit, cheaper)] = 0.0

    sizes = np.array([of_prompt.counts[: len(SIZES)] for of_prompt in labelled.features]).max(axis=0) + ROOM
    file = ClassifierFile(
        features=VERSION,
        best=names[labelled.best],
        accuracy={name: round(float(labelled.right[:, column].mean()), 5) for column, name in enumerate(names)},
        prices=dict(zip(names, prices, strict=True)),
        vocabulary=design.vocabulary,
        models=models,
        largest=[round(size, 4) for size in sizes.tolist()],
        known=limit,
        curve=[],
    )
    outcomes = Outcomes(labelled.right, labelled.cost, probability, labelled.best, labelled.groups)
    return Fit(file, outcomes, constant)


Folds = list[tuple[np.ndarray, np.ndarray]]


def _unseen(
    features: Sequence[Features], label: np.ndarray, folds: Folds, designs: Sequence[Design]
) -> tuple[float, np.ndarray]:
    """The strength with the least log loss, and the log odds of every question by a regression without its part."""
    odds = {strength: np.zeros(len(label)) for strength in STRENGTHS}
    for (train, test), design in zip(folds, designs, strict=True):
        learn = design.matrix([features[place] for place in train])
        predict = design.matrix([features[place] for place in test])
        for strength, of_strength in odds.items():
            of_strength[test] = _regression(strength).fit(learn, label[train]).decision_function(predict)
    sign = np.where(label, 1, -1)
    strength = min(odds, key=lambda strength: float(np.logaddexp(0, -sign * odds[strength]).mean()))
    return strength, odds[strength]


def _regression(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=2000)


def _platt(odds: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Slope and offset that make log odds calibrated (Platt, Probabilistic Outputs for Support Vector Machines,
    1999)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scaling = LogisticRegression(C=1e3).fit(odds[:, None], label)
    return float(scaling.coef_[0, 0]), float(scaling.intercept_[0])


def _calibrated(odds: np.ndarray, label: np.ndarray, folds: Folds) -> np.ndarray:
    """Probabilities of every question, calibrated on the other parts."""
    found = np.zeros(len(odds))
    for train, test in folds:
        slope, offset = _platt(odds[train], label[train])
        found[test] = 1 / (1 + np.exp(-np.clip(slope * odds[test] + offset, -700, 700)))
    return found
