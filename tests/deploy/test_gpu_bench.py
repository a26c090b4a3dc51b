"""`make gpu-check` and `make gpu-bench` with tiny sizes: the program that runs on a GPU, without Ray and company."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.topology import ShardLayout, weight_bytes
from raytroupe.deploy.bench.gpu import run_parts
from raytroupe.deploy.bench.gpu.engine_models import LLAMA_3_8B, QWEN3_0_6B, write_model
from raytroupe.deploy.bench.gpu.engine_points_gpu import bytes_per_token, prefill_flops
from raytroupe.deploy.bench.gpu.host_gaps import GAP_MICROSECONDS, steady_timeline
from raytroupe.deploy.bench.gpu.kernel_check import relative_error
from raytroupe.deploy.bench.gpu.paged_step import blocks_needed, paged_step
from raytroupe.deploy.bench.gpu.part import Order, Row, with_unit
from raytroupe.deploy.bench.gpu.run_parts import Part, choose, run_part
from raytroupe.deploy.bench.gpu.timing import median_seconds

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("ray", "zmq", "fastapi", "uvloop", "openai", "matplotlib", "jinja2")
"""Not on a machine that has only what computes."""
HIDE = f"""
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT!r} else find(name, path, target)
machinery.PathFinder.find_spec = classmethod(find_spec)
"""
CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """An environment in which `ABSENT` cannot be imported, nor in processes that are started in it."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(HIDE)
    environment = {name: value for name, value in os.environ.items() if name not in ("TROUPE_KERNELS", "COLUMNS")}
    return environment | {"PYTHONPATH": str(folder)}


def run_command(name: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"raytroupe.deploy.bench.gpu.{name}", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_the_environment_hides_what_a_bare_machine_lacks(bare):
    program = f"""
for name in {ABSENT!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        print(name)
"""
    done = subprocess.run([sys.executable, "-c", program], env=bare, capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(ABSENT)


@pytest.fixture(scope="module", params=["check", "bench"])
def measured(request, bare, tmp_path_factory):
    """(table, content of the JSON file) of a command."""
    file = tmp_path_factory.mktemp(request.param) / "figures.json"
    done = run_command(request.param, bare, "--tiny", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param, done.stdout, json.loads(file.read_text())


EXPECTED = {
    "check": [
        "attention, bfloat16",
        "experts, float32",
        "quantised products, bfloat16",
        "eight bit products, float32",
        "quantised experts, bfloat16",
        "llama, float32",
        "qwen3_moe, float32",
        "mixed load",
    ],
    "bench": [
        "copy on the device",
        "bf16 product",
        "attention, decode, batch 1",
        "attention, decode, skewed",
        "attention, prefill",
        "RMS norm",
        "residual + RMS norm",
        "SiLU",
        "rotary + KV store",
        "int4 g128",
        "W8A8 int8",
        "W8A8 float8",
        "8B shape: batch-1 decode",
        "8B shape: host gaps",
        "8B shape: prefill",
        "0.6B shape: 4 mixed requests",
        "0.6B shape: one at a time",
        "transformers, continuous",
        "transformers, generate",
    ],
}


def test_a_command_fills_its_table_and_file(measured):
    name, table, content = measured
    rows = content["rows"]
    for what in EXPECTED[name]:
        assert any(row["what"].startswith(what) for row in rows), what
    for row in rows:
        assert "error" not in row
        assert row["what"] in table
        assert "value" in row or row["text"]
        if "ratio" in row:
            # Tiny sizes are far from any target, and a figure of zero or of many thousands would be a wrong unit.
            assert 0 <= row["ratio"] < 1e4
            assert math.isfinite(row["value"])
    assert content["environment"]["torch"] == torch.__version__
    lines = table.splitlines()
    assert re.fullmatch(rf"{len(rows)} rows, 0 errors, \d+ of \d+ targets met, \d+ s", lines[-1])
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120


def test_every_figure_that_has_a_target_is_compared(measured):
    name, _, content = measured
    wanted = {"check": 28, "bench": 12 + torch.cuda.is_available()}[name]
    assert sum("ratio" in row and "target" in row for row in content["rows"]) == wanted


@no_gpu
@pytest.mark.parametrize("name", ["check", "bench"])
def test_without_a_gpu_a_command_says_so_in_one_line(name):
    done = run_command(name, dict(os.environ))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [run_parts.NO_GPU]
    assert "--tiny" in done.stderr


@pytest.mark.parametrize("target", ["gpu-check", "gpu-bench"])
def test_make_takes_the_given_interpreter_and_installs_nothing(target):
    command = ["make", "--dry-run", target, "GPU_PYTHON=python9", "ARGS=--tiny"]
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"python9 -m raytroupe.deploy.bench.gpu.{target.removeprefix('gpu-')} --tiny" in recipe
    assert ".venv" not in recipe
    assert "pip" not in recipe


FAULTY = """
import os
from raytroupe.deploy.bench.gpu.part import Row

def report_and_raise(context):
    context.report(Row(what="first", value=2.0, key="two"))
    with context.guard("second"):
        raise ValueError("broken\\nin two lines")
    context.report(Row(what="third", value=context.known("one")))
    raise RuntimeError("at the end")

def report_and_die(context):
    context.report(Row(what="first"))
    os._exit(7)
"""


def order(function: str, folder: Path) -> Order:
    known = {"one": 1.0}
    rows = str(folder / "rows")
    return Order(part="faulty", function=function, rows=rows, known=known, tiny=True, seconds=60, began=time.time())


def without_device(rows: list[Row]) -> list[tuple[str, float | None, str]]:
    return [(row.what, row.value, row.error) for row in rows if row.key != "device"]


@pytest.fixture
def faulty(tmp_path, monkeypatch) -> Path:
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_what_goes_wrong_in_a_part_becomes_a_row_and_the_rest_is_kept(faulty):
    assert without_device(run_part(order("faulty:report_and_raise", faulty))) == [
        ("first", 2.0, ""),
        ("second", None, "ValueError: broken in two lines"),
        ("third", 1.0, ""),
        ("faulty", None, "RuntimeError: at the end"),
    ]


def test_a_process_that_dies_leaves_its_rows(faulty):
    assert without_device(run_part(order("faulty:report_and_die", faulty))) == [
        ("first", None, ""),
        ("faulty", None, "its process ended with status 7"),
    ]


def test_a_part_that_takes_too_long_leaves_its_rows(tmp_path, monkeypatch):
    def hang(*_arguments, timeout, **_options):
        (tmp_path / "rows").write_text('{"what": "first"}\n')
        raise subprocess.TimeoutExpired("a command", timeout)

    monkeypatch.setattr(run_parts.subprocess, "run", hang)
    assert without_device(run_part(order("any:thing", tmp_path))) == [
        ("first", None, ""),
        ("faulty", None, "ended after its 60 s"),
    ]


def test_a_later_part_knows_what_an_earlier_one_measured_and_errors_decide_the_exit_status(monkeypatch):
    seen = []

    def measure(order):
        seen.append((order.part, dict(order.known)))
        return [Row(what="value", key=order.part, value=3.0)]

    monkeypatch.setattr(run_parts, "run_part", measure)
    parts = [Part("a", "m:f", 10), Part("b", "m:f", 10)]
    outcome = run_parts.run_parts(parts, tiny=True, seconds=100, began=time.time(), together=False)
    assert seen == [("a", {}), ("b", {"a": 3.0})]
    assert outcome.exit_status == 0
    outcome = run_parts.run_parts(parts, tiny=True, seconds=100, began=time.time() - 99, together=False)
    assert [row.error for _, row in outcome.rows] == ["not begun: 100 s are over"] * 2
    assert outcome.exit_status == 1


def test_parts_are_chosen_by_name_and_some_always_run():
    parts = [Part("ceilings", "m:f", 1, always=True), Part("a", "m:f", 1), Part("b", "m:f", 1)]
    assert [part.name for part in choose(parts, None)] == ["ceilings", "a", "b"]
    assert [part.name for part in choose(parts, "b")] == ["ceilings", "b"]
    with pytest.raises(ValueError, match=r"no part c; there are ceilings, a, b"):
        choose(parts, "b,c")


def test_weights_and_operations_of_the_published_shapes(tmp_path):
    llama = load_spec(write_model(tmp_path / "llama", LLAMA_3_8B))
    assert weight_bytes(llama, ShardLayout(), 2) == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert bytes_per_token(llama, 0) == pytest.approx(2 * 7.50e9, rel=1e-3)  # the embedding is looked up
    assert bytes_per_token(llama, 1000) - bytes_per_token(llama, 0) == 1000 * 131_072
    assert prefill_flops(llama, 1) == pytest.approx(2 * 7.50e9, rel=1e-3)
    qwen = load_spec(write_model(tmp_path / "qwen", QWEN3_0_6B))
    assert weight_bytes(qwen, ShardLayout(), 2) == pytest.approx(2 * 0.596e9, rel=1e-3)
    assert bytes_per_token(qwen, 0) == weight_bytes(qwen, ShardLayout(), 2)  # the embedding is the head


def test_steps_have_shuffled_blocks_that_nobody_shares():
    rows = [(1, 40), (1, 1), (20, 33), (5, 5)]
    step = paged_step(rows, CPU)
    used = [table[: -(-context // 16)].tolist() for table, (_, context) in zip(step.block_tables, rows, strict=True)]
    flat = [block for table in used for block in table]
    assert sorted(flat) == list(range(1, blocks_needed(rows)))
    assert flat != sorted(flat)
    assert step.decode_rows == 2
    assert step.positions.tolist() == [39, 0, *range(13, 33), *range(5)]
    assert step.slot_mapping[0] == used[0][2] * 16 + 39 % 16
    assert step.query_start.tolist() == [0, 1, 2, 22, 27]


def test_only_long_pauses_of_the_device_are_gaps():
    short, long = GAP_MICROSECONDS / 2, 4 * GAP_MICROSECONDS
    kernels, time_ = [], 0.0
    for index in range(100):
        kernels.append((time_, time_ + 80))
        time_ += 80 + (long if index % 2 else short)
    timeline = steady_timeline(kernels, (0.0, 1.0))
    assert timeline.span_us == pytest.approx(100 * 80 + 50 * short + 49 * long)
    assert timeline.gaps_us == pytest.approx(49 * long)
    assert timeline.idle_us == pytest.approx(49 * long + 50 * short)
    overlapping = [(0.0, 100.0), (10.0, 20.0), (50.0, 150.0)]
    assert steady_timeline(overlapping, (0.0, 1.0)).idle_us == 0


def test_a_gap_that_reaches_out_of_the_steady_part_counts_within_it_only():
    assert steady_timeline([(0.0, 30.0), (90.0, 100.0)], (0.4, 0.8)).gap_share == 1.0
    assert steady_timeline([(0.0, 50.0), (70.0, 100.0)], (0.4, 0.9)).gaps_us == pytest.approx(20.0)


def test_a_median_counts_the_calls_of_one_pass():
    calls = []
    timing = median_seconds([lambda: calls.append(1), lambda: calls.append(2)], CPU)
    assert calls == [1, 2] * (len(calls) // 2)
    assert timing.seconds > 0
    assert not timing.recorded


def test_errors_of_results_are_relative_and_wrong_shapes_and_nan_never_pass():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert relative_error(expected[:1], expected) == math.inf
    assert not relative_error(torch.tensor([3.0, math.nan]), expected) <= 1e9


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.01e12, "B/s", "3.01 TB/s"),
        (798e12, "FLOP/s", "798 TFLOP/s"),
        (12_345.6, "tok/s", "12,346 tok/s"),
        (41.23, "tok/s", "41.2 tok/s"),
        (0.00171, "s", "1.71 ms"),
        (12.5e-6, "s", "12.5 µs"),
        (0.0217, "", "2.2%"),
    ],
)
def test_figures_are_written_with_units(value, unit, text):
    assert with_unit(value, unit) == text


def test_a_target_is_met_from_above_or_from_below():
    assert Row(what="", ratio=0.8, target=0.75).meets_target
    assert not Row(what="", ratio=0.7, target=0.75).meets_target
    assert Row(what="", ratio=0.02, target=0.03, at_most=True).meets_target
    assert Row(what="", ratio=0.7).meets_target is None
