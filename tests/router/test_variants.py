"""Which models may answer: what fits, then rules, then the classifier, and without one the best model alone."""

from __future__ import annotations

from typing import Any

import pytest
from routing_fleet import card

from raytroupe.cluster.router_config import EscalationConfig, RouterConfig, RuleConfig
from raytroupe.router.decision import Choice
from raytroupe.router.prompt_features import PromptFacts
from raytroupe.router.variants import Variants

LARGE, MIDDLE, SMALL = (
    card(name, weight_bytes=size) for name, size in (("large", 900), ("middle", 500), ("small", 90))
)
CARDS = [SMALL, LARGE, MIDDLE]
GROUP = [card.name for card in CARDS]


class Fitted:
    """A classifier that has made up its mind."""

    best = "large"

    def __init__(self, threshold: float = 0.8, **probabilities: float) -> None:
        self._threshold, self._probabilities = threshold, probabilities
        self.asked: list[float] = []

    def threshold(self, quality: float) -> float:
        self.asked.append(quality)
        return self._threshold

    def probabilities(self, facts: PromptFacts) -> dict[str, float]:
        return {**self._probabilities, self.best: 1.0}


def facts(text: str = "hello", **fields: Any) -> PromptFacts:
    return PromptFacts(**{"text": text, "chars": len(text), "prompt_tokens": 10, **fields})


def choose(
    config: RouterConfig | None = None,
    classifier: Any = None,
    *,
    cards: list[Any] | None = None,
    group: list[str] | None = None,
    about: PromptFacts | None = None,
    given_up: dict[str, str] | None = None,
) -> Choice:
    group = GROUP if group is None else group
    variants = Variants(cards or CARDS, config or RouterConfig(), classifier)
    return variants.choose(group, about or facts(), given_up)


# --- the best model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RouterConfig(), RouterConfig(quality=0.1)])
def test_without_a_classifier_the_best_model_alone_answers(config) -> None:
    choice = choose(config)
    assert choice.models == ("large",)
    assert "no classifier" in choice.reason
    assert set(choice.excluded) == {"small", "middle"}
    assert choice.probabilities == {}
    assert choice.draft is None


def test_the_best_is_the_one_that_was_measured_best_if_all_were_measured() -> None:
    measured = [
        card(name, weight_bytes=size, accuracy=accuracy)
        for name, size, accuracy in (("a", 9, 0.5), ("b", 5, 0.7), ("c", 7, 0.0))
    ]
    assert Variants(measured, RouterConfig(), None).best_first(["a", "b", "c"]) == ["b", "a", "c"]
    unmeasured = [*measured, card("d", weight_bytes=6)]
    assert Variants(unmeasured, RouterConfig(), None).best_first(["a", "b", "c", "d"]) == ["a", "c", "d", "b"]
    assert Variants(unmeasured, RouterConfig(), None).best_first(["a", "b"]) == ["b", "a"]


def test_of_equally_accurate_models_the_largest_is_the_best() -> None:
    equal = [card("a", weight_bytes=1, accuracy=0.5), card("b", weight_bytes=2, accuracy=0.5)]
    assert Variants(equal, RouterConfig(), None).best_first(["a", "b"]) == ["b", "a"]


def test_the_classifier_knows_which_model_is_the_best() -> None:
    classifier = Fitted()
    classifier.best = "small"
    assert Variants(CARDS, RouterConfig(), classifier).best_first(GROUP) == ["small", "large", "middle"]  # type: ignore[arg-type]


def test_a_model_that_was_named_is_the_only_one() -> None:
    config = RouterConfig(rules=[RuleConfig(name="all", use=["large"])])
    choice = choose(config, Fitted(), group=["small"])
    assert (choice.models, choice.reason, choice.excluded) == (("small",), "the only model", {})


# --- rules --------------------------------------------------------------------------------------------------------

RULES = RouterConfig(
    rules=[
        RuleConfig(name="sums", use=["small"], pattern=r"\d+ \+ \d+"),
        RuleConfig(name="poems", use=["middle", "large"], pattern="poem"),
        RuleConfig(name="numbers", use=["middle"], pattern=r"\d"),
    ]
)


@pytest.mark.parametrize("classifier", [None, Fitted(small=0.99, middle=0.99), Fitted(small=0.0, middle=0.0)])
@pytest.mark.parametrize(
    ("text", "models", "name"),
    [("12 + 3", ("small",), "sums"), ("a poem of 12 + 3", ("small",), "sums"), ("7 times 8", ("middle",), "numbers"),
     ("a poem", ("middle", "large"), "poems")],
)  # fmt: skip
def test_the_first_rule_that_applies_decides_before_any_classifier(classifier, text, models, name) -> None:
    choice = choose(RULES, classifier, about=facts(text))
    assert choice.models == models
    assert choice.reason == f"rule {name!r}"
    assert choice.excluded == {model: f"rule {name!r}" for model in GROUP if model not in models}


def test_a_rule_that_names_no_model_of_the_group_is_none() -> None:
    choice = choose(RULES, group=["middle", "large"], about=facts("12 + 3"))
    assert choice.models == ("large",)
    assert "no classifier" in choice.reason


def test_of_what_a_rule_names_only_models_of_the_group_answer() -> None:
    assert choose(RULES, group=["small", "large"], about=facts("a poem")).models == ("large",)


# --- the classifier -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("small", "middle", "models"),
    [
        (0.79, 0.79, ("large",)),
        (0.80, 0.79, ("large", "small")),
        (0.10, 0.99, ("large", "middle")),
        (0.95, 0.95, ("large", "middle", "small")),
    ],
)
def test_models_that_are_probably_good_enough_may_answer_and_the_best_always(small, middle, models) -> None:
    choice = choose(classifier=Fitted(small=small, middle=middle))
    assert choice.models == models
    assert choice.probabilities == {"large": 1.0, "small": small, "middle": middle}
    assert set(choice.excluded) == set(GROUP) - set(models)
    assert all("< 0.80" in why for why in choice.excluded.values())


def test_the_threshold_follows_from_the_configured_quality() -> None:
    classifier = Fitted(threshold=1.0, small=0.99999, middle=0.99999)
    assert choose(RouterConfig(quality=0.97), classifier).models == ("large",)
    assert classifier.asked == [0.97]


def test_a_model_that_was_not_fitted_is_never_good_enough() -> None:
    assert choose(classifier=Fitted(small=0.9)).models == ("large", "small")


def test_where_the_fitted_best_is_not_allowed_the_best_of_the_others_is_good_enough() -> None:
    choice = choose(classifier=Fitted(small=0.1, middle=0.1), group=["small", "middle"])
    assert choice.models == ("middle",)
    assert choice.probabilities["middle"] == 1.0


# --- drafts -------------------------------------------------------------------------------------------------------

DRAFTS = RouterConfig(escalation=EscalationConfig(draft="small"))


def test_without_a_classifier_the_draft_comes_first() -> None:
    choice = choose(DRAFTS)
    assert choice.models == ("small",)
    assert choice.draft == "small"
    assert choice.excluded == {"large": "waits for the draft", "middle": "waits for the draft"}


def test_with_a_classifier_the_draft_is_checked_if_it_answers() -> None:
    assert choose(DRAFTS, Fitted(small=0.9)).draft == "small"
    assert choose(DRAFTS, Fitted(small=0.9)).models == ("large", "small")
    assert choose(DRAFTS, Fitted(small=0.1)).models == ("large",)


@pytest.mark.parametrize("group", [["small"], ["large", "middle"]])
def test_without_another_model_or_outside_of_the_group_nobody_drafts(group) -> None:
    assert choose(DRAFTS, group=group).draft is None


def test_the_best_model_does_not_draft() -> None:
    config = RouterConfig(escalation=EscalationConfig(draft="large"))
    choice = choose(config)
    assert (choice.models, choice.draft) == (("large",), None)


def test_a_rule_overrules_the_draft() -> None:
    config = RouterConfig(
        escalation=EscalationConfig(draft="small"), rules=[RuleConfig(name="any", use=["small", "large"])]
    )
    assert choose(config).draft is None


# --- given up -----------------------------------------------------------------------------------------------------


def test_models_that_were_tried_stand_in_the_reason() -> None:
    choice = choose(group=["small", "middle"], given_up={"large": "down"})
    assert choice.models == ("middle",)
    assert choice.reason.startswith("large: down; ")
    assert choice.excluded["large"] == "down"
