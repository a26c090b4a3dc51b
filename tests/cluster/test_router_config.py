"""The `router` part of a configuration: what stands in it means something, and mistakes are named before a start."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from raytroupe.cluster.latency_class import DEFAULT_TARGETS
from raytroupe.cluster.router_config import RouterConfig

MODELS = ["large", "small"]


def test_nothing_needs_to_be_configured() -> None:
    config = RouterConfig()
    config.check_models(MODELS)
    assert config.all_groups(MODELS) == {"auto": MODELS}
    assert config.targets() == DEFAULT_TARGETS
    assert not config.shadow
    assert config.escalation is None
    assert not config.salt_by_api_key


def test_auto_is_all_models_unless_it_is_a_group_of_its_own() -> None:
    groups = {"cheap": ["small"], "auto": ["small", "large"]}
    config = RouterConfig(groups=groups)
    config.check_models([*MODELS, "other"])
    assert config.all_groups([*MODELS, "other"]) == groups
    assert RouterConfig(groups={"cheap": ["small"]}).all_groups(MODELS) == {"auto": MODELS, "cheap": ["small"]}


def test_targets_are_in_seconds_and_keep_what_is_not_given() -> None:
    config = RouterConfig(classes={"interactive": {"ttft_target_ms": 250}, "batch": {"refuse_late": True}})
    targets = config.targets()
    assert (targets["interactive"].ttft, targets["interactive"].tpot) == (0.25, DEFAULT_TARGETS["interactive"].tpot)
    assert targets["batch"].refuse_late
    assert targets["batch"].ttft == DEFAULT_TARGETS["batch"].ttft
    assert targets["batch"].yields
    assert targets["default"] == DEFAULT_TARGETS["default"]
    assert {name: target.name for name, target in targets.items()} == {name: name for name in DEFAULT_TARGETS}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"groups": {"cheap": []}}, "group 'cheap' is empty"),
        ({"groups": {"cheap": ["small", "large", "small"]}}, "group 'cheap' names a model twice"),
        ({"groups": ["small"]}, "groups"),
        ({"classes": {"realtime": {}}}, "unknown class 'realtime'; known: interactive, default, batch"),
        ({"classes": {"explicit": {}}}, "unknown class 'explicit'"),
        ({"classes": {"batch": {"ttft_target_ms": 0}}}, "greater than 0"),
        ({"classes": {"batch": {"ttft_target_ms": float("nan")}}}, "finite"),
        ({"classes": {"batch": {"tpot_target_ms": 86_400_001}}}, "less than or equal to 86400000"),
        ({"classes": {"batch": {"tpot_target_ms": True}}}, "not a switch"),
        ({"classes": {"batch": {"target": 3}}}, "target"),
        ({"rules": [{"name": "r", "use": []}]}, "use"),
        ({"rules": [{"name": "", "use": ["small"]}]}, "name"),
        ({"rules": [{"name": "x" * 65, "use": ["small"]}]}, "name"),
        ({"rules": [{"use": ["small"]}]}, "name"),
        ({"rules": [{"name": "r", "use": ["small"], "pattern": "(a"}]}, "not a regular expression"),
        ({"rules": [{"name": "r", "use": ["small"], "latency_class": "fast"}]}, "latency_class"),
        ({"rules": [{"name": "r", "use": ["small"], "min_prompt_tokens": -1}]}, "min_prompt_tokens"),
        ({"rules": [{"name": "r", "use": ["small"], "regex": "a"}]}, "regex"),
        ({"quality": 0}, "quality"),
        ({"quality": 1.01}, "quality"),
        ({"quality": float("nan")}, "quality"),
        ({"escalation": {"draft": "small", "tokens": 0}}, "tokens"),
        ({"escalation": {"draft": "small", "tokens": 257}}, "tokens"),
        ({"escalation": {"draft": "small", "min_logprob": 0.1}}, "min_logprob"),
        ({"escalation": {}}, "draft"),
        ({"weights": {"price": -0.1}}, "price"),
        ({"weights": {"price": float("inf")}}, "price"),
        ({"weights": {"ttft": float("nan")}}, "ttft"),
        ({"weights": {"cost": 1}}, "cost"),
        ({"index_blocks": 0}, "index_blocks"),
        ({"index_blocks": 100_000_001}, "index_blocks"),
        ({"shadow": "perhaps"}, "shadow"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_mistake_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        RouterConfig(**fields)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"groups": {"cheap": ["small", "tiny"]}},
            r"router.groups.cheap: the model 'tiny' is not served; served: large",
        ),
        ({"groups": {"small": ["large"]}}, "'small' is the name of a model"),
        ({"rules": [{"name": "sums", "use": ["tiny"]}]}, r"router.rules \(sums\): the model 'tiny'"),
        ({"escalation": {"draft": "tiny"}}, "router.escalation.draft: the model 'tiny'"),
    ],
)
def test_models_that_are_not_served_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RouterConfig(**fields).check_models(MODELS)


def test_a_group_may_not_be_named_in_a_rule() -> None:
    config = RouterConfig(groups={"cheap": ["small"]}, rules=[{"name": "r", "use": ["cheap"]}])
    with pytest.raises(ValueError, match="'cheap' is not served"):
        config.check_models(MODELS)


def test_no_model_may_be_called_auto() -> None:
    with pytest.raises(ValueError, match="served_model_name"):
        RouterConfig().check_models(["auto", "small"])
