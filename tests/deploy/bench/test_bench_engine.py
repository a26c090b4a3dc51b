"""`troupe bench engine`: speeds and latencies of the engine in process, on a tiny model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import make_tiny_model

from raytroupe.actors.local_engine import LocalEngine
from raytroupe.cluster.step import StepResult
from raytroupe.deploy.bench.engine import resolve_model
from raytroupe.deploy.bench.engine_points import StepTimes, run_point
from raytroupe.deploy.bench.peers.points import Point

Troupe = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny")


def result(tokens: int) -> StepResult:
    return StepResult(0, [1] * tokens, None, model_seconds=0.0, total_seconds=0.0)


def test_command_prints_and_writes_the_same_figures(troupe: Troupe, tiny: Path, tmp_path: Path) -> None:
    file, plot = tmp_path / "engine.json", tmp_path / "engine.svg"
    options = ["--concurrency", "1,3", "--prompt", "20", "--output", "6", "--repeats", "2", "--dtype", "float32"]
    options += ["--num-threads", "1", "--kv-cache-memory", "8MiB"]
    done = troupe("bench", "engine", str(tiny), *options, "--json", str(file), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert written["settings"]["dtype"] == "float32"
    assert written["settings"]["enable_prefix_caching"] is False
    assert [row["concurrency"] for row in written["rows"]] == [1, 3]
    for row in written["rows"]:
        runs = written["notes"]["runs"][str(row["concurrency"])]
        assert len(runs) == 2
        total = [row["concurrency"] * 6 / run["total_s"] for run in runs]
        prefill = [row["concurrency"] * 20 / run["prefill_s"] for run in runs]
        assert row["total"] == pytest.approx(sum(total) / 2)
        assert (row["prefill_min"], row["prefill_max"]) == (pytest.approx(min(prefill)), pytest.approx(max(prefill)))
        for run in runs:
            assert run["ttft"]["count"] == row["concurrency"]
            assert run["itl"]["count"] == row["concurrency"] * 5
            assert run["ttft"]["max"] < run["total_s"]
        assert f"{row['total']:,.1f}" in done.stdout
    assert plot.read_text().startswith("<?xml")


def test_latencies_of_a_step_budget_smaller_than_the_prompts(tiny: Path) -> None:
    """Requests begin one after the other, so that steps mix first tokens with later ones."""
    fields = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64}
    with LocalEngine(tiny, **fields, enable_prefix_caching=False, kv_cache_memory="8MiB") as engine:
        run = run_point(engine, Point(4, 24, 8), vocab_size=131)
    assert run.ttft is not None
    assert run.itl is not None
    assert (run.ttft.count, run.itl.count) == (4, 4 * 7)
    assert run.ttft.p50 < run.ttft.max


def test_tokens_of_steps_become_first_tokens_and_gaps() -> None:
    times = StepTimes(Point(3, 4, 3), start=0.0)
    for tokens in (0, 1, 3, 3, 2):  # one begins, then two more; the first ends after its third token
        times.take(result(tokens))
    assert len(times.first_tokens) == 3
    assert times.first_tokens[0] < times.first_tokens[1] == times.first_tokens[2]
    assert len(times.gaps) == 6
    assert times.complete


def test_a_preempted_request_leaves_no_latencies() -> None:
    times = StepTimes(Point(2, 4, 3), start=0.0)
    for tokens in (2, 1, 2, 1):
        times.take(result(tokens))
    assert not times.complete


def test_embedded_models_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (resolve_model("demo-small", Console()) / "config.json").exists()


def test_missing_benchmark_model_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("raytroupe.deploy.make_bench_model.write_model", made.append)
    folder = resolve_model(None, Console(quiet=True))
    assert made == [folder] == [Path("bench-models/llama-254m")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/no/model"], "/no/model: no such folder"),
        (["demo-small", "--concurrency", "1,x"], "--concurrency '1,x': write whole numbers from 1 on"),
        (["demo-small", "--dtype", "int7"], "dtype = 'int7'"),
        (["demo-small", "--field", "speed=11"], "speed: unknown field"),
        (["demo-small", "--field", "speed"], "--field 'speed': write NAME=VALUE"),
        (["demo-small", "--plot", "engine.txt"], "--plot engine.txt: the name must end in"),
        (["demo-small", "--kv-cache-memory", "lots"], "kv_cache_memory = 'lots'"),
    ],
)
def test_bad_values_are_refused_in_one_line(troupe: Troupe, options: list[str], message: str) -> None:
    done = troupe("bench", "engine", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
