"""What the ingress records of a request: each latency once where it belongs, nothing for one that failed."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import httpx
import pytest

from raytroupe.cluster.errors import EngineError, QueueFull
from raytroupe.cluster.latency_class import LatencyTargets
from raytroupe.router.api import build_app
from raytroupe.router.metrics import IngressMetrics, RequestTimer

BODY = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}


class Recorder:
    """Takes the place of Ray's metric objects, which only count inside a cluster."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.tags: dict[str, list[Any]] = defaultdict(list)

    def metric(self, name: str) -> RecordedMetric:
        return RecordedMetric(self, name)


class RecordedMetric:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def observe(self, value: float, tags: Any) -> None:
        self._recorder.values[self._name].append(value)
        self._recorder.tags[self._name].append(tags)

    inc = observe


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def metrics(recorder: Recorder) -> IngressMetrics:
    metrics = IngressMetrics("ingress-1")
    for name in ("time_to_first_token", "inter_token_latency", "e2e_latency", "success", "within_targets", "refused"):
        setattr(metrics, name, recorder.metric(name))
    return metrics


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_recorded(card, engine, metrics, recorder, stream) -> None:
    engine.tokens_per_output = 2
    outputs = -(-(len(engine.tokens("Paris is nice.")) + 1) // 2)
    app = build_app([card], engine, metrics=metrics)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://troupe/v1/") as client:
        await client.post("chat/completions", json=BODY | {"n": 2, "stream": stream})
        counts = {name: len(values) for name, values in recorder.values.items()}
        assert counts == {
            "time_to_first_token": 1,
            "inter_token_latency": 2 * (outputs - 1),
            "success": 2,
            "e2e_latency": 1,
            "within_targets": 1,
        }
        tags = {"model_name": "demo", "latency_class": "default"}
        assert recorder.tags["success"] == [{**tags, "finished_reason": "stop"}] * 2
        assert recorder.tags["e2e_latency"] == recorder.tags["within_targets"] == [tags]
        assert set(recorder.tags["inter_token_latency"]) == {("demo", "default")}
        assert 0 < recorder.values["time_to_first_token"][0] <= recorder.values["e2e_latency"][0]
        recorder.values.clear()
        engine.error, engine.error_after = EngineError("died"), 2
        await client.post("chat/completions", json=BODY | {"stream": stream})
        assert set(recorder.values) == {"time_to_first_token"}


async def test_a_refused_request_counts_with_its_class_and_reason(card, engine, metrics, recorder) -> None:
    engine.error = QueueFull("too many", retry_after=3)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(build_app([card], engine, metrics=metrics)), base_url="http://troupe/v1/"
    ) as client:
        response = await client.post("chat/completions", json=BODY, headers={"x-latency-class": "batch"})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert recorder.tags == {"refused": [{"latency_class": "batch", "code": "queue_full"}]}


def timed(metrics, monkeypatch, times: list[float], latency: LatencyTargets) -> RequestTimer:
    clock = iter(times)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    return RequestTimer(metrics, "demo", latency)


def test_tokens_that_came_together_share_the_time_since_the_last(metrics, recorder, monkeypatch) -> None:
    timer = timed(metrics, monkeypatch, [10.0, 12.0, 18.0, 18.5], LatencyTargets(ttft=1.0))
    timer.tokens(0, 3)
    timer.tokens(0, 0)
    timer.tokens(0, 4)
    timer.finished()
    assert recorder.values == {"time_to_first_token": [2.0], "inter_token_latency": [1.5], "e2e_latency": [8.5]}


@pytest.mark.parametrize(
    ("ttft", "tpot", "within"), [(2.0, 1.625, True), (1.9, 9.0, False), (9.0, 1.6, False), (9.0, 9.0, True)]
)
def test_goodput_needs_both_targets(metrics, recorder, monkeypatch, ttft, tpot, within) -> None:
    timer = timed(metrics, monkeypatch, [10.0, 12.0, 18.0, 18.5], LatencyTargets(ttft=ttft, tpot=tpot))
    timer.tokens(0, 1)
    timer.tokens(0, 4)
    timer.finished()
    assert ("within_targets" in recorder.values) == within
