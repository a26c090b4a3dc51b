"""`/metrics` joins what the nodes publish about this application."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from raytroupe.router.api import build_app
from raytroupe.router.cluster_metrics import ClusterMetrics, joined, keep_own_series

NODE = """\
# HELP ray_troupe_request_success_total Choices.
# TYPE ray_troupe_request_success_total counter
ray_troupe_request_success_total{replica="%s"} 3.0
# HELP ray_node_cpu CPU.
# TYPE ray_node_cpu gauge
ray_node_cpu 5.0
# HELP ray_serve_num_replicas Replicas.
# TYPE ray_serve_num_replicas gauge
ray_serve_num_replicas{node="%s"} 1.0
python_info 1.0
"""


def test_only_our_series_are_kept_and_every_metric_is_described_once() -> None:
    text = joined([keep_own_series(NODE % (name, name)) for name in ("a", "b")])
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {"ray_troupe_request_success", "ray_serve_num_replicas"}
    assert [sample.labels["replica"] for sample in families["ray_troupe_request_success"].samples] == ["a", "b"]
    assert text.count("# TYPE") == 2
    assert joined([]) == ""


@pytest.fixture
async def metrics(monkeypatch):
    """Metrics of two nodes, one of which does not answer."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "10.0.0.2":
            raise httpx.ConnectError("refused")
        return httpx.Response(200, text=NODE % ("a", "a"))

    monkeypatch.setattr(
        "ray.nodes",
        lambda: [
            {"Alive": True, "NodeManagerAddress": "10.0.0.1", "MetricsExportPort": 9000},
            {"Alive": True, "NodeManagerAddress": "10.0.0.2", "MetricsExportPort": 9000},
            {"Alive": False, "NodeManagerAddress": "10.0.0.3", "MetricsExportPort": 9000},
        ],
    )
    metrics = ClusterMetrics()
    await metrics._client.aclose()
    metrics._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    yield metrics
    await metrics.close()


async def test_a_node_that_does_not_answer_is_left_out(metrics, card, engine) -> None:
    app = build_app([card], engine, metrics_text=metrics.text)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://troupe") as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'ray_troupe_request_success_total{replica="a"} 3.0' in response.text
