"""Rules: the first whose every condition is true."""

from __future__ import annotations

from typing import Any

import pytest

from raytroupe.cluster.router_config import RuleConfig
from raytroupe.router.prompt_features import PromptFacts
from raytroupe.router.rules import SEARCHED, first_match


def rule(name: str = "rule", **conditions: Any) -> RuleConfig:
    return RuleConfig(name=name, use=["small"], **conditions)


def facts(text: str = "hello", **fields: Any) -> PromptFacts:
    return PromptFacts(**{"text": text, "chars": len(text), "prompt_tokens": 10, **fields})


@pytest.mark.parametrize(
    ("conditions", "true", "false"),
    [
        ({"pattern": r"(?i)^hello\b"}, facts("Hello you"), facts("Say hello")),
        ({"min_prompt_tokens": 10}, facts(prompt_tokens=10), facts(prompt_tokens=9)),
        ({"max_prompt_tokens": 10}, facts(prompt_tokens=10), facts(prompt_tokens=11)),
        ({"latency_class": "batch"}, facts(latency_class="batch"), facts()),
        ({"tools": True}, facts(tools=True), facts()),
        ({"tools": False}, facts(), facts(tools=True)),
        ({"json_schema": True}, facts(json_schema=True), facts()),
        ({"pattern": "x", "tools": True}, facts("x", tools=True), facts("x")),
    ],
)
def test_condition(conditions: dict[str, Any], true: PromptFacts, false: PromptFacts) -> None:
    only = rule(**conditions)
    assert first_match([only], true) is only
    assert first_match([only], false) is None


def test_the_first_rule_that_applies_wins() -> None:
    rules = [rule("tools", tools=True), rule("short", max_prompt_tokens=20), rule("all")]
    assert first_match(rules, facts()) is rules[1]
    assert first_match(rules, facts(prompt_tokens=21)) is rules[2]
    assert first_match([], facts()) is None


def test_a_pattern_sees_both_ends_of_a_long_text_and_no_more() -> None:
    padding = "-" * SEARCHED
    assert first_match([rule(pattern="needle")], facts("needle" + padding)) is not None
    assert first_match([rule(pattern="needle")], facts(padding + "needle")) is not None
    assert first_match([rule(pattern="needle")], facts(padding + "needle" + padding)) is None
    assert first_match([rule(pattern="ab")], facts("a" * SEARCHED + "b" * SEARCHED)) is None
