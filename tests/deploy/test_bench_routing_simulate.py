"""The comparison of routers in simulated time, as a user runs it."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.bench.routing.simulate import main


def simulate(tmp_path, *arguments: str) -> dict:
    app = typer.Typer()
    app.command()(main)
    output = tmp_path / "figures.json"
    result = CliRunner().invoke(app, [*arguments, "--json", str(output)])
    if result.exception is not None:
        raise result.exception
    return json.loads(output.read_text())


def by_router(report: dict) -> dict[str, dict]:
    return {row["router"]: row for row in report["rows"]}


def test_real_overlaps_find_more_than_turns(tmp_path):
    options = "--requests 200 --groups 12 --prefix 128 --cache-blocks 64 --workloads shared --clients 8"
    rows = by_router(simulate(tmp_path, *options.split()))
    assert set(rows) == {"troupe", "round-robin", "power-of-two", "longest-match"}
    assert all(row["requests"] == 200 and not row["errors"] for row in rows.values())
    assert rows["troupe"]["hit_rate"] > 1.2 * rows["round-robin"]["hit_rate"]


def test_a_trace_is_replayed_at_its_own_times(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 500 * number, "input_length": 700, "output_length": 8, "hash_ids": [number % 3, 10 + number]}
        for number in range(60)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = simulate(tmp_path, "--trace", str(trace), "--replicas", "3", "--routers", "troupe,round-robin")
    rows = by_router(report)
    assert report["settings"]["load"] == "29.5 s of trace.jsonl"
    assert rows["troupe"]["requests"] == 60
    assert rows["troupe"]["hit_rate"] == pytest.approx(57 * 512 / (60 * 700))
    assert rows["troupe"]["ttft_p99"] < 100, "nobody waits for anybody"
    crowded = by_router(simulate(tmp_path, "--trace", str(trace), "--time-scale", "0.0001", "--routers", "troupe"))
    assert crowded["troupe"]["ttft_p99"] > 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--curve 1,2", "three numbers"),
        ("--curve 0,0,1", "takes time"),
        ("--curve 1,-1,1", "negative"),
        ("--trace nowhere.jsonl", "nowhere.jsonl"),
        ("--trace nowhere.jsonl --rate 5", "own times"),
        ("--cache-blocks 20", "--cache-blocks 20"),
        ("--routers nobody", "--routers"),
        ("--workloads nothing", "--workloads"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        simulate(tmp_path, *options.split())
