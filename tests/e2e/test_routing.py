"""Models and replicas are chosen by what the running replicas report."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from .conftest import eventually

if TYPE_CHECKING:
    from .conftest import Application

EASY, HARD = "What is the capital of France?", "What is 17 + 25?"


def chat(question: str, model: str = "pair", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, **fields}


def route_of(answer: httpx.Response) -> dict[str, str]:
    """The parts of the header that says who answered."""
    return dict(part.split("=", 1) for part in answer.headers["x-troupe-route"].split("; ") if "=" in part)


def test_a_rule_decides_and_otherwise_the_best_model_answers(application: Application) -> None:
    for question, model, reason in ((EASY, "small", "rule 'easy'"), (HARD, "large", "best model")):
        answer = application.http.post("/v1/chat/completions", json=chat(question)).raise_for_status()
        assert answer.json()["model"] == route_of(answer)["model"] == model
        assert route_of(answer)["reason"].startswith(reason)


def test_a_prompt_goes_where_it_is_warm(application: Application) -> None:
    """Cached tokens as predicted are those that the engine found."""
    prompt = [*range(100, 420)]
    body = {"model": "large-twice", "prompt": prompt, "max_tokens": 2, "temperature": 0}
    first = application.http.post("/v1/completions", json=body).raise_for_status()
    assert route_of(first)["cached"] == "0/320"

    def route() -> dict[str, Any]:
        return application.http.post("/v1/route", json=body).raise_for_status().json()

    eventually(lambda: any(c["cached_tokens"] for c in route()["candidates"]), 10, lambda: str(route()))
    for _ in range(3):
        again = application.http.post("/v1/completions", json=body).raise_for_status()
        assert route_of(again)["replica"] == route_of(first)["replica"]
        assert route_of(again)["cached"] == "304/320"
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 304
    other = application.http.post("/v1/completions", json={**body, "cache_salt": "mine"}).raise_for_status()
    assert route_of(other)["cached"] == "0/320"


def test_a_dry_run_shows_every_candidate_and_generates_nothing(application: Application) -> None:
    before = [stats["generated_tokens"] for stats in application.engine_stats("small")]
    found = application.http.post("/v1/route", json=chat(EASY)).raise_for_status().json()
    assert found["model"] == "small"
    by_model = {candidate["model"]: candidate for candidate in found["candidates"]}
    assert by_model["small"]["chosen"]
    assert by_model["large"]["excluded"] == "rule 'easy'"
    assert all(candidate["replica"] and candidate["ttft_ms"] > 0 for candidate in found["candidates"])
    assert [stats["generated_tokens"] for stats in application.engine_stats("small")] == before


def test_a_step_curve_is_measured(application: Application) -> None:
    for _ in range(3):
        application.answer("small", EASY)
    found = application.http.post("/v1/route", json=chat(EASY, "small")).raise_for_status().json()
    assert found["candidates"][0]["measured"]


@pytest.mark.parametrize(
    ("headers", "complaint"),
    [
        ({"x-latency-class": "urgent"}, "known: interactive, default, batch"),
        ({"x-ttft-target-ms": "0.000001"}, "impossible"),
        ({"x-tpot-target-ms": "-3"}, "milliseconds > 0"),
    ],
)
def test_unknown_classes_and_impossible_targets_are_refused(application: Application, headers, complaint) -> None:
    application.answer("small", EASY, max_tokens=12)  # so that the speed is known
    answer = application.http.post("/v1/chat/completions", json=chat(EASY), headers=headers)
    assert answer.status_code == 400
    assert complaint in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["interactive", "batch"])
def test_classes_are_served_and_counted(application: Application, name: str) -> None:
    answer = application.http.post("/v1/chat/completions", json=chat(EASY), headers={"x-latency-class": name})
    assert "Paris" in answer.raise_for_status().json()["choices"][0]["message"]["content"]
    series = re.compile(rf'ray_troupe_request_within_targets\S*{{[^}}]*latency_class="{name}"')
    eventually(
        lambda: series.search(application.http.get("/metrics").text) is not None,
        60,
        lambda: "\n".join(re.findall("ray_troupe_request_within.*", application.http.get("/metrics").text)),
    )


def test_the_command_explains(application: Application) -> None:
    command = [sys.executable, "-m", "raytroupe.deploy.cli", "explain", EASY, "--model", "pair"]
    shown = subprocess.run([*command, "--url", application.address], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "rule 'easy'" in shown.stdout
    refused = subprocess.run([*command, "--url", "http://127.0.0.1:9"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "is `troupe serve` running there?" in refused.stderr
