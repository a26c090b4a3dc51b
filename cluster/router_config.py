"""How requests are routed: the `router` part of a configuration."""

from __future__ import annotations

import re
from typing import Literal

import msgspec
from pydantic import Field, field_validator, model_validator

from .latency_class import CLASS_NAMES, DEFAULT_TARGETS, LatencyTargets
from .strict_model import StrictModel

AUTO = "auto"
"""The group of all models, unless the configuration says otherwise."""


class LatencyClassConfig(StrictModel):
    """Targets of one latency class; what is not given stays as `DEFAULT_TARGETS` has it."""

    ttft_target_ms: float | None = Field(default=None, gt=0, le=86_400_000)
    tpot_target_ms: float | None = Field(default=None, gt=0, le=86_400_000)
    refuse_late: bool | None = None
    """Refuse a request (429) whose first token cannot come in time, instead of serving it late."""


class RuleConfig(StrictModel):
    """A rule that goes before the classifier. It applies if everything that it names is true of a request; the first
    one that applies decides which models may answer."""

    name: str = Field(min_length=1, max_length=64)
    use: list[str] = Field(min_length=1)
    """Models that may answer; the cost function chooses among them."""
    pattern: str | None = None
    """Regular expression, searched in the last message of the user (or the prompt)."""
    min_prompt_tokens: int | None = Field(default=None, ge=0)
    max_prompt_tokens: int | None = Field(default=None, ge=0)
    latency_class: Literal["interactive", "default", "batch", "explicit"] | None = None
    tools: bool | None = None
    """The conversation has calls of tools or their results, or offers tools."""
    json_schema: bool | None = None
    """The answer has to be JSON (`response_format`)."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return value


class EscalationConfig(StrictModel):
    """Let a small model draft the first tokens unseen, and a better one answer if the draft looks unsure."""

    draft: str
    tokens: int = Field(default=8, ge=1, le=256)
    min_logprob: float = Field(default=-0.5, le=0)
    """Mean log-probability of the drafted tokens, below which the better model answers instead."""


class CostWeights(StrictModel):
    """Weights of the cost function (`router/cost.py`). Every term is without unit: 1 is as much as its limit."""

    ttft: float = Field(default=1.0, ge=0)
    """Of the predicted time to the first token, in units of the target."""
    tpot: float = Field(default=1.0, ge=0)
    """Of the predicted time per token, in units of the target."""
    late: float = Field(default=10.0, ge=0)
    """Of what either exceeds its target by, in units of the target."""
    delay: float = Field(default=0.5, ge=0)
    """Of the time that computing the prompt takes from other requests, in units of the TTFT target: less spreads hot
    prefixes faster, more keeps caches apart."""
    price: float = Field(default=1.0, ge=0)
    """Of the price, in units of the dearest candidate's."""
    switch: float = Field(default=0.1, ge=0)
    """Of answering a session with another model than its last one."""


class RouterConfig(StrictModel):
    """The router of an application."""

    groups: dict[str, list[str]] = Field(default_factory=dict)
    """Names that a client may give as `model` → models that may answer. Without a group `auto`, it is all models."""
    classes: dict[str, LatencyClassConfig] = Field(default_factory=dict)
    rules: list[RuleConfig] = Field(default_factory=list)
    classifier: str | None = None
    """File that `troupe router fit` has written. Without one the best model of a group answers."""
    quality: float = Field(default=0.99, gt=0, le=1)
    """Share of the best model's right answers that has to be kept; decides how sure of a cheaper model to be."""
    shadow: bool = False
    """Decide and log which model would answer, but let the best one answer."""
    escalation: EscalationConfig | None = None
    weights: CostWeights = CostWeights()
    index_blocks: int = Field(default=1_000_000, ge=1, le=100_000_000)
    """KV blocks whose places an ingress remembers at most."""
    salt_by_api_key: bool = False
    """Share cached prefixes only among requests with the same API key."""

    @field_validator("classes")
    @classmethod
    def _known_classes(cls, value: dict[str, LatencyClassConfig]) -> dict[str, LatencyClassConfig]:
        if unknown := sorted(set(value) - set(CLASS_NAMES)):
            raise ValueError(f"unknown class {unknown[0]!r}; known: {', '.join(CLASS_NAMES)}")
        return value

    @model_validator(mode="after")
    def _groups_have_members(self) -> RouterConfig:
        for name, members in self.groups.items():
            if not members:
                raise ValueError(f"group {name!r} is empty; name the models that may answer")
            if len(set(members)) < len(members):
                raise ValueError(f"group {name!r} names a model twice: {', '.join(members)}")
        return self

    def targets(self) -> dict[str, LatencyTargets]:
        """The classes by name, with their configured targets."""
        found = {}
        for name, default in DEFAULT_TARGETS.items():
            given = self.classes.get(name, LatencyClassConfig())
            found[name] = msgspec.structs.replace(
                default,
                ttft=default.ttft if given.ttft_target_ms is None else given.ttft_target_ms / 1000,
                tpot=default.tpot if given.tpot_target_ms is None else given.tpot_target_ms / 1000,
                refuse_late=default.refuse_late if given.refuse_late is None else given.refuse_late,
            )
        return found

    def check_models(self, models: list[str]) -> None:
        """Refuse names that are not served, and groups that hide a model. Raises ValueError."""
        for group, members in self.groups.items():
            if group in models:
                raise ValueError(f"router.groups: {group!r} is the name of a model; choose another for the group")
            _check_served(f"router.groups.{group}", members, models)
        for rule in self.rules:
            _check_served(f"router.rules ({rule.name})", rule.use, models)
        if self.escalation is not None:
            _check_served("router.escalation.draft", [self.escalation.draft], models)
        if AUTO in models:
            raise ValueError(f"{AUTO!r} lets the router choose a model; give the model another served_model_name")

    def all_groups(self, models: list[str]) -> dict[str, list[str]]:
        """The groups, `auto` among them."""
        return {AUTO: list(models), **self.groups}


def _check_served(where: str, names: list[str], models: list[str]) -> None:
    if unknown := [name for name in names if name not in models]:
        raise ValueError(f"{where}: the model {unknown[0]!r} is not served; served: {', '.join(models)}")
