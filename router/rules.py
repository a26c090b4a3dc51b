"""Rules of the configuration, which go before the classifier."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from ..cluster.router_config import RuleConfig
from .prompt_features import PromptFacts

SEARCHED = 4096
"""Characters of the text, half of them from its beginning and half from its end, in which a pattern is searched: what
bounds the time that a pattern takes, since a client chooses the text. A pattern that repeats a repetition, such as
(a+)+b, can be slow in far fewer."""


def first_match(rules: Sequence[RuleConfig], facts: PromptFacts) -> RuleConfig | None:
    """The first rule all of whose conditions are true of the request."""
    return next((rule for rule in rules if applies(rule, facts)), None)


def applies(rule: RuleConfig, facts: PromptFacts) -> bool:
    """Whether everything that the rule names is true; a rule that names nothing always applies."""
    return (
        (rule.min_prompt_tokens is None or facts.prompt_tokens >= rule.min_prompt_tokens)
        and (rule.max_prompt_tokens is None or facts.prompt_tokens <= rule.max_prompt_tokens)
        and (rule.latency_class is None or facts.latency_class == rule.latency_class)
        and (rule.tools is None or facts.tools == rule.tools)
        and (rule.json_schema is None or facts.json_schema == rule.json_schema)
        and (rule.pattern is None or _found(rule.pattern, facts.text))
    )


def _found(pattern: str, text: str) -> bool:
    """A pattern is searched in beginning and end apart, so that nothing is found across the gap."""
    expression = _compiled(pattern)
    if len(text) <= SEARCHED:
        return expression.search(text) is not None
    half = SEARCHED // 2
    return expression.search(text[:half]) is not None or expression.search(text[-half:]) is not None


@functools.cache  # as many as the configuration has
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
