"""Which models of a group may answer a request: by rule, else by classifier, else the best one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ..cluster.messages import ModelCard
from ..cluster.router_config import RouterConfig
from .classifier import Classifier
from .decision import Choice
from .prompt_features import PromptFacts
from .rules import first_match


class Variants:
    """The configured rules and the fitted classifier over the served models."""

    def __init__(self, cards: Sequence[ModelCard], config: RouterConfig, classifier: Classifier | None) -> None:
        self._cards = {card.name: card for card in cards}
        self._rules = config.rules
        self._classifier = classifier
        self._draft = config.escalation.draft if config.escalation is not None else None
        self._ranked: dict[tuple[str, ...], list[str]] = {}
        self._threshold = classifier.threshold(config.quality) if classifier is not None else 1.0

    def best_first(self, models: Sequence[str]) -> list[str]:
        """`models` by quality: measured accuracy where every one has it, else size of the weights."""
        key = tuple(models)
        if key not in self._ranked:
            self._ranked[key] = self._rank(key)
        return self._ranked[key]

    def _rank(self, models: tuple[str, ...]) -> list[str]:
        measured = all(self._cards[model].accuracy is not None for model in models)
        ranked = sorted(models, key=lambda name: self._quality(self._cards[name], measured), reverse=True)
        if self._classifier is not None and self._classifier.best in ranked:
            ranked.remove(self._classifier.best)
            ranked.insert(0, self._classifier.best)
        return ranked

    def choose(
        self,
        group: Sequence[str],
        facts: PromptFacts,
        given_up: Mapping[str, str] | None = None,
    ) -> Choice:
        """The models of `group` that may answer.

        Args:
            group: models that the client allows, at least one.
            facts: of the prompt.
            given_up: other models of the group → why they do not answer.
        """
        choice = self._choose(group, facts)
        if given_up:
            reason = "; ".join(f"{model}: {why}" for model, why in given_up.items())
            choice = msgspec.structs.replace(
                choice, reason=f"{reason}; {choice.reason}", excluded={**choice.excluded, **given_up}
            )
        return choice

    def _choose(self, group: Sequence[str], facts: PromptFacts) -> Choice:
        models = self.best_first(group)
        if len(models) == 1:
            return Choice((models[0],), "the only model")
        rule = first_match(self._rules, facts)
        if rule is not None and (named := [model for model in rule.use if model in models]):
            others = {model: f"rule {rule.name!r}" for model in models if model not in named}
            return Choice(tuple(named), f"rule {rule.name!r}", excluded=others)
        best = models[0]
        draft = self._draft if self._draft in models and self._draft != best else None
        if self._classifier is None and draft is not None:
            others = dict.fromkeys([model for model in models if model != draft], "waits for the draft")
            return Choice((draft,), "drafts before it is seen", excluded=others, draft=draft)
        if self._classifier is None:
            others = dict.fromkeys(models[1:], "no classifier is fitted, so the best model answers")
            return Choice((best,), "best model: no classifier", excluded=others)
        known = self._classifier.probabilities(facts)
        probabilities = {model: 1.0 if model == best else known.get(model, 0.0) for model in models}
        enough = [model for model in models if model == best or probabilities[model] >= self._threshold]
        excluded = {
            model: f"good enough with probability {probabilities[model]:.2f} < {self._threshold:.2f}"
            for model in models
            if model not in enough
        }
        reason = f"{len(enough)} of {len(models)} good enough" if len(enough) > 1 else "only the best is good enough"
        return Choice(tuple(enough), reason, probabilities, excluded, draft)

    @staticmethod
    def _quality(card: ModelCard, measured: bool) -> tuple[float, float]:
        return (card.accuracy or 0.0) if measured else 0.0, float(card.weight_bytes)
