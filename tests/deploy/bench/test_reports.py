"""What the benchmarks have in common: requests that repeat exactly, and reports whose table and JSON agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from raytroupe.deploy.bench import scheduler as bench_scheduler
from raytroupe.deploy.bench.mixed_requests import mixed_requests, wanted_tokens
from raytroupe.deploy.bench.report import (
    Column,
    Report,
    measure_in_turn,
    percentile,
    publish,
    sessions_share_cores,
)
from raytroupe.deploy.make_bench_model import VOCAB_SIZE, bench_config, byte_tokenizer


def test_requests_repeat_exactly_and_stay_in_their_ranges() -> None:
    requests = mixed_requests(200, 1000, prompt_len=(5, 9), output_len=(2, 4))
    assert requests == mixed_requests(200, 1000, prompt_len=(5, 9), output_len=(2, 4))
    assert {len(request.prompt) for request in requests} == {5, 6, 7, 8, 9}
    assert {request.output_len for request in requests} == {2, 3, 4}
    assert all(16 <= token < 1000 for request in requests for token in request.prompt)
    assert wanted_tokens(requests) == sum(request.output_len for request in requests)


def test_variants_are_the_same_work_with_other_tokens() -> None:
    first, second = (mixed_requests(50, 32_000, variant=variant) for variant in (0, 1))
    assert [(len(r.prompt), r.output_len) for r in first] == [(len(r.prompt), r.output_len) for r in second]
    assert all(one.prompt[:4] != other.prompt[:4] for one, other in zip(first, second, strict=True))
    assert mixed_requests(50, 32_000, seed=1) != first


def test_sides_are_measured_in_turn() -> None:
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) or float(len(order)) for name in ("ours", "theirs")}
    assert measure_in_turn(sides, 2) == {"ours": [1.0, 3.0], "theirs": [2.0, 4.0]}
    assert order == ["ours", "theirs", "ours", "theirs"]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 50), (0.99, 99), (1.0, 100)])
def test_percentile(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_report_prints_and_writes_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = [Column("side", "side"), Column("seconds", "s", ".2f"), Column("ratio", "×", ".1f")]
    rows = [{"side": "theirs", "seconds": 3.0}, {"side": "ours", "seconds": 1.5, "ratio": 2.0}]
    publish(Report("bench_example", {"repeats": 3}, columns, rows), tmp_path / "new" / "figures.json")
    table = capsys.readouterr().out
    lines = [line for line in table.splitlines() if line.startswith("│")]
    assert "bench_example" in table
    assert [cell.strip() for cell in lines[1].strip("│").split("│")] == ["ours", "1.50", "2.0"]
    written = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert written["rows"] == rows
    assert written["settings"] == {"repeats": 3}
    assert written["environment"]["torch"] == torch.__version__
    assert written["environment"]["python"] == sys.version.split()[0]


def test_scheduler_benchmark_runs_both_loads(tmp_path: Path) -> None:
    path = tmp_path / "scheduler.json"
    bench_scheduler.main(running=8, steps=40, json_file=path)
    decode, turnover = json.loads(path.read_text())["rows"]
    assert decode["running"] == 8
    assert decode["steps"] == turnover["steps"] == 40
    assert 0 < decode["median_ms"] <= decode["p99_ms"]


def test_benchmark_model_has_254_million_parameters() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(bench_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 254_313_472


def test_tokenizer_of_the_benchmark_model_keeps_any_text() -> None:
    tokenizer = byte_tokenizer(VOCAB_SIZE)
    text = "Grüße, 世界 🙂\n"
    tokens = tokenizer(text).input_ids
    assert len(tokenizer) == VOCAB_SIZE
    assert max(tokens) < 3 + 256
    assert tokenizer.decode(tokens) == text


def test_the_environment_says_whether_sessions_share_the_cores(tmp_path):
    setting = tmp_path / "sched_autogroup_enabled"
    assert sessions_share_cores(setting) is None
    setting.write_text("1\n")
    assert sessions_share_cores(setting) is True
    setting.write_text("0\n")
    assert sessions_share_cores(setting) is False
