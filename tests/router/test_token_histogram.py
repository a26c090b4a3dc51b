"""The ingress's own histogram publishes the series that Prometheus' client would."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from raytroupe.router import token_histogram
from raytroupe.router.token_histogram import TokenHistogram

BOUNDARIES = [0.001, 0.25, 0.5, 2.5]


class RecordedGauge:
    """Takes the place of Ray's gauges, which only keep values inside a cluster."""

    series: ClassVar[dict[tuple[str, frozenset[tuple[str, str]]], float]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._name, self._keys = name, set(tag_keys)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == self._keys
        self.series[self._name, frozenset(tags.items())] = value


def published(values: list[tuple[str, float]]) -> dict[Any, float]:
    RecordedGauge.series = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_histogram, "Gauge", RecordedGauge)
        histogram = TokenHistogram("seconds", "Time.", BOUNDARIES, ("model_name", "latency_class"), {"replica": "r"})
    for model, value in values:
        histogram.observe(value, (model, "batch"))
        histogram.publish()  # again and again: totals, not increments
    return RecordedGauge.series


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(BOUNDARIES) | st.floats(0, 10)), max_size=30))
def test_series_are_those_of_prometheus(values) -> None:
    registry = CollectorRegistry()
    reference = Histogram(
        "seconds", "Time.", ["model_name", "latency_class", "replica"], buckets=BOUNDARIES, registry=registry
    )
    for model, value in values:
        reference.labels(model, "batch", "r").observe(value)
    wanted = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }
    assert published(values) == pytest.approx(wanted)


def test_nothing_is_published_of_a_model_without_values() -> None:
    assert published([]) == {}
