"""From headers and `service_tier` to latency targets; what makes no sense is refused by name."""

from __future__ import annotations

import pytest

from raytroupe.cluster.errors import InvalidRequest
from raytroupe.cluster.latency_class import DEFAULT_TARGETS, LatencyTargets
from raytroupe.cluster.router_config import LatencyClassConfig, RouterConfig
from raytroupe.router.latency_request import MAX_TARGET_MS, latency_targets

CLASSES = DEFAULT_TARGETS


def of(tier: str | None = None, **headers: str) -> LatencyTargets:
    return latency_targets({f"x-{name.replace('_', '-')}": text for name, text in headers.items()}, tier, CLASSES)


def test_a_request_that_says_nothing_is_of_the_default_class() -> None:
    assert of() == CLASSES["default"]


@pytest.mark.parametrize("name", ["interactive", "default", "batch"])
def test_the_header_names_the_class(name) -> None:
    assert of(latency_class=name) is CLASSES[name]


@pytest.mark.parametrize(
    ("tier", "name"),
    [("auto", "default"), ("default", "default"), ("flex", "batch"), ("priority", "interactive"), ("batch", "batch"),
     ("interactive", "interactive")],
)  # fmt: skip
def test_a_service_tier_stands_for_a_class(tier, name) -> None:
    assert of(tier) is CLASSES[name]


def test_the_header_goes_before_the_tier() -> None:
    assert of("flex", latency_class="interactive").name == "interactive"


def test_configured_targets_are_the_classs() -> None:
    config = RouterConfig(classes={"batch": LatencyClassConfig(ttft_target_ms=1500, refuse_late=True)})
    targets = latency_targets({}, "flex", config.targets())
    assert (targets.ttft, targets.tpot, targets.refuse_late) == (1.5, CLASSES["batch"].tpot, True)


def test_targets_of_its_own_make_a_request_explicit() -> None:
    assert of(ttft_target_ms="250") == LatencyTargets(name="explicit", ttft=0.25, tpot=0.2, refuse_late=True)
    assert of(tpot_target_ms="50.5") == LatencyTargets(name="explicit", ttft=5.0, tpot=0.0505, refuse_late=True)
    both = of("flex", ttft_target_ms="1e3", tpot_target_ms="1")
    assert both == LatencyTargets(name="explicit", ttft=1.0, tpot=0.001, refuse_late=True)
    assert not both.yields


def test_what_is_not_given_comes_from_the_class() -> None:
    assert of(latency_class="interactive", ttft_target_ms="250").tpot == CLASSES["interactive"].tpot


@pytest.mark.parametrize("name", ["", "Interactive", "explicit", "realtime", "batch ", "x" * 5000])
def test_an_unknown_class_is_refused_with_the_known_ones(name) -> None:
    with pytest.raises(InvalidRequest, match="interactive, default, batch") as refused:
        of(latency_class=name)
    assert refused.value.param == "x-latency-class"
    assert name[:80] in refused.value.message
    assert len(refused.value.message) < 300


@pytest.mark.parametrize("tier", ["", "scale", "explicit", "Priority", "x" * 64])
def test_an_unknown_tier_is_refused_with_the_known_ones(tier) -> None:
    with pytest.raises(InvalidRequest, match="auto, default, flex, priority") as refused:
        of(tier)
    assert refused.value.param == "service_tier"


@pytest.mark.parametrize("header", ["ttft_target_ms", "tpot_target_ms"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "0",
        "-1",
        "-0.0",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "Infinity",
        "1e999",
        "86400001",
        "10 20",
        "0x10",
        "9" * 400,
    ],
)
def test_a_target_that_is_no_positive_number_is_refused(header, text) -> None:
    with pytest.raises(InvalidRequest, match="milliseconds > 0") as refused:
        of(**{header: text})
    assert refused.value.param == f"x-{header.replace('_', '-')}"
    assert refused.value.param in refused.value.message
    assert len(refused.value.message) < 300


def test_the_longest_target_is_a_day() -> None:
    assert of(ttft_target_ms=str(MAX_TARGET_MS)).ttft == 86_400
