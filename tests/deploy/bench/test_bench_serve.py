"""`troupe bench serve` from its options to its table, its JSON and its plot, against a server on a real socket."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytroupe.cluster.errors import ConfigError, EngineError
from raytroupe.deploy.bench import command
from raytroupe.deploy.bench.client import parse_url
from raytroupe.deploy.bench.server_probe import Probe

from .conftest import StreamServer

COMMAND = [sys.executable, "-m", "raytroupe.deploy.cli", "bench", "serve"]


Bench = Callable[..., subprocess.CompletedProcess[str]]
Measure = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def bench(troupe: Bench) -> Bench:
    """Runs `troupe bench serve` with the given arguments."""
    return lambda *arguments: troupe("bench", "serve", *arguments)


@pytest.fixture
def measure(bench: Bench, server: StreamServer, tmp_path: Path) -> Measure:
    """Runs it against the server; what it printed, and its JSON."""

    def run(*arguments: str) -> tuple[str, dict[str, Any]]:
        file = tmp_path / "figures" / "serve.json"
        done = bench(server.url, "--output", "4", "--json", str(file), *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(file.read_text())

    return run


def test_sweep_of_both_loops(measure: Measure, server: StreamServer, tmp_path: Path) -> None:
    plot = tmp_path / "figures" / "serve.svg"
    loads = ["--concurrency", "1,3", "--rate", "50,inf", "--requests", "6"]
    text, written = measure(*loads, "--slo", "ttft:10s,e2e:20s", "--plot", str(plot))
    points = written["notes"]["points"]
    assert [point["load"] for point in points] == ["1 client", "3 clients", "50 req/s", "inf req/s"]
    for point in points:
        assert point["requests"] == point["completed"] == 6
        assert (point["output_tokens"], point["prompt_tokens"]) == (24, 42), "as the server's usage says"
        assert point["goodput_share"] == 1.0
        latencies = point["latencies"]
        assert latencies["itl"]["count"] == 18
        assert latencies["ttft"]["p50"] <= latencies["ttft"]["p90"] <= latencies["ttft"]["p99"]
        assert latencies["ttft"]["mean"] < latencies["e2e"]["mean"]
        times = point["requests_in_order"][0]["token_times"]
        assert len(times) == 4
    assert written["rows"][3]["ratio"] == pytest.approx(
        points[3]["output_tokens_per_second"] / points[0]["output_tokens_per_second"]
    )
    for heading in ("TTFT", "p99", "rejected", "errors", "output tok/s", "good/s", "42.9% of the prompt tokens"):
        assert heading in text
    assert plot.read_text().startswith("<?xml")
    measured = server.requests[-24:]
    assert all(len(body["prompt"]) == 128 and body["ignore_eos"] for body in measured)
    assert len({tuple(body["prompt"]) for body in server.requests}) == len(server.requests)


def test_failures_stand_beside_the_latencies(measure: Measure, tmp_path: Path) -> None:
    options = ["--model", "full-after-two", "--concurrency", "1", "--requests", "5", "--warm-up", "0"]
    text, written = measure(*options, "--plot", str(tmp_path / "serve.png"))
    (point,) = written["notes"]["points"]
    assert (point["completed"], point["rejected"], point["errors"]) == (1, 4, 0), "one answer went to the probe"
    assert point["failures"] == {"HTTP 429": 4}
    row = next(line for line in text.splitlines() if "TTFT" in line)
    assert [cell.strip() for cell in row.split("│")][-4:-1] == ["1", "4", "0"]
    assert "4 × HTTP 429; the first one: queue is full" in text
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_no_rejections(measure: Measure) -> None:
    options = ["--model", "broken-after-two", "--concurrency", "2", "--requests", "4", "--warm-up", "0"]
    _, written = measure(*options)
    (point,) = written["notes"]["points"]
    assert (point["completed"], point["rejected"], point["errors"]) == (1, 0, 3)


def test_nothing_answered_is_a_failure(bench: Bench, server: StreamServer) -> None:
    done = bench(server.url, "--model", "cut", "--concurrency", "2")
    assert done.returncode == 1
    assert "answered none of 4 requests: cut off" in done.stderr
    without_warm_up = bench(server.url, "--model", "cut", "--concurrency", "2", "--warm-up", "0", "--output", "4")
    assert without_warm_up.returncode == 1
    assert "16 × cut off" in without_warm_up.stdout


def test_chat_with_texts(measure: Measure, server: StreamServer) -> None:
    options = ["--endpoint", "chat", "--prompt-form", "text", "--concurrency", "2", "--requests", "4"]
    _, written = measure(*options, "--prompt", "uniform:5:9")
    assert written["notes"]["points"][0]["completed"] == 4
    texts = [body["messages"][0]["content"] for body in server.requests[-4:]]
    assert all(5 <= len(text.split()) <= 9 for text in texts)


def test_trace_is_replayed_at_its_own_times(measure: Measure, server: StreamServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1000 * index, "input_length": 600, "output_length": 3 + index, "hash_ids": [5, index]}
        for index in range(4)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    _, written = measure("--trace", str(trace), "--time-scale", "0.2")
    (point,) = written["notes"]["points"]
    assert point["load"] == "as recorded"
    due = [request["scheduled"] for request in point["requests_in_order"]]
    assert due == pytest.approx([0.0, 0.2, 0.4, 0.6], abs=1e-3)
    bodies = server.requests[-4:]
    assert [body["max_tokens"] for body in bodies] == [3, 4, 5, 6]
    assert len({tuple(body["prompt"][:512]) for body in bodies}) == 1
    assert len({tuple(body["prompt"]) for body in bodies}) == 4


def test_shared_prefixes_reach_the_server(measure: Measure, server: StreamServer) -> None:
    options = ["--prefix-groups", "2", "--prefix-len", "64", "--prompt", "8", "--requests", "12", "--concurrency", "2"]
    measure(*options)
    prompts = [body["prompt"] for body in server.requests[-12:]]
    assert {len(prompt) for prompt in prompts} == {72}
    assert len({tuple(prompt[:64]) for prompt in prompts}) == 2


def test_fields_that_a_server_refuses_are_left_out(bench: Bench, server: StreamServer) -> None:
    done = bench(server.url, "--model", "openai", "--concurrency", "1", "--requests", "2", "--output", "4")
    assert done.returncode == 0, done.stderr
    assert "refuses ignore_eos" in done.stderr
    assert all("stream_options" in body and "ignore_eos" not in body for body in server.requests[-2:])


def test_a_vocabulary_that_the_server_has_is_found(measure: Measure, bench: Bench, server: StreamServer) -> None:
    options = ["--model", "small-vocabulary", "--concurrency", "1", "--requests", "2"]
    _, written = measure(*options)
    assert written["settings"]["vocab_size"] == 4000
    assert max(max(body["prompt"]) for body in server.requests[-2:]) < 4000
    refused = bench(server.url, "--model", "small-vocabulary", "--vocab-size", "9000")
    assert refused.returncode == 1
    assert "400: token id does not exist" in refused.stderr


def test_key_is_sent_and_not_written(measure: Measure, bench: Bench, server: StreamServer, tmp_path: Path) -> None:
    options = ["--model", "locked", "--concurrency", "1", "--requests", "1", "--api-key", "secret"]
    measure(*options, "--header", "X-Team: blue")
    assert server.headers[-1]["x-team"] == "blue"
    assert "secret" not in (tmp_path / "figures" / "serve.json").read_text()
    refused = bench(server.url, "--model", "locked")
    assert refused.returncode == 1
    assert "401: no key" in refused.stderr


def test_interruption_prints_what_was_measured(server: StreamServer, tmp_path: Path) -> None:
    file = tmp_path / "serve.json"
    options = ["--model", "slow", "--concurrency", "2", "--output", "4", "--requests", "1000", "--json", str(file)]
    # A shell starts what runs in the background with interrupts ignored, and children inherit it.
    process = subprocess.Popen(
        [*COMMAND, server.url, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(server.requests) < 14 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted" in text
    assert "Traceback" not in errors
    (point,) = json.loads(file.read_text())["notes"]["points"]
    assert point["completed"] >= 4
    assert point["unfinished"] == 2


def test_models_are_asked_for(server: StreamServer) -> None:
    with Probe(parse_url(server.url), {}) as probe:
        assert probe.models() == ["plain"]
        server.models = []
        with pytest.raises(EngineError, match="lists no models"):
            probe.models()


def test_one_of_several_models_has_to_be_chosen(bench: Bench, server: StreamServer) -> None:
    server.models = ["a", "b"]
    done = bench(server.url)
    assert done.returncode == 2
    assert done.stderr == f"error: {server.url} serves a, b; choose one with --model\n"


def test_a_server_that_is_not_there_is_said_in_one_line(bench: Bench) -> None:
    done = bench("http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no server answers at http://127.0.0.1:9/v1 (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "nowhere"}, "URL 'nowhere'"),
        ({"concurrency": "0"}, "--concurrency '0': write whole numbers"),
        ({"concurrency": "1,2.5"}, "--concurrency '1,2.5'"),
        ({"concurrency": "1,,2"}, "--concurrency '1,,2'"),
        ({"rate": "-1"}, "--rate '-1': write positive numbers or inf"),
        ({"rate": "nan"}, "--rate 'nan'"),
        ({"prompt": "lots"}, "--prompt 'lots'"),
        ({"output_len": "uniform:9"}, "--output 'uniform:9'"),
        ({"duration": 0.0}, "--duration 0: must be a positive number"),
        ({"timeout": float("inf")}, "--timeout inf"),
        ({"prefix_groups": 3}, "--prefix-groups 3 and --prefix-len 0"),
        ({"time_scale": 2.0}, "name it with --trace"),
        ({"trace": Path("/no/trace")}, "--trace /no/trace: No such file"),
        ({"trace_format": "csv", "trace": Path("/no/trace")}, "--trace-format csv"),
        ({"endpoint": "responses"}, "--endpoint responses: choose completions or chat"),
        ({"endpoint": "chat"}, "--prompt-form text"),
        ({"prompt_form": "words"}, "--prompt-form words"),
        ({"slo": "ttft"}, "--slo 'ttft'"),
        ({"header": ["nothing"]}, "--header 'nothing': write NAME:VALUE"),
        ({"header": ["a: b\r\nc: d"]}, "only printable ASCII"),
        ({"api_key": "schlüssel"}, "only printable ASCII"),
        ({"plot": Path("plot.gif")}, r"--plot plot.gif: the name must end in .png"),
    ],
)
def test_bad_values_are_refused_before_anything_is_sent(
    server: StreamServer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        command.serve(**{**DEFAULTS, "url": server.url, **options})
    assert message in str(refusal.value)
    assert server.requests == []


DEFAULTS: dict[str, Any] = {
    "concurrency": None,
    "rate": None,
    "trace": None,
    "api_key": None,
    "prompt": "128",
    "output_len": "64",
}


def test_help_imports_nothing_that_takes_long() -> None:
    program = "import raytroupe.deploy.cli, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert {"matplotlib", "numpy", "torch", "ray", "transformers", "uvloop"}.isdisjoint(done.stdout.split())
