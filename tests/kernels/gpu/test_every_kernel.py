"""Every Triton kernel is tried under the interpreter, compiles for the GPUs that it is for, and spills nothing."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime.interpreter import InterpretedFunction

import raytroupe
from raytroupe.deploy.bench.gpu.compile_cases import CASES

SOURCES = Path(raytroupe.__file__).parent / "kernels" / "gpu"
MODULES = [importlib.import_module(f"raytroupe.kernels.gpu.{path.stem}") for path in sorted(SOURCES.glob("*.py"))]
KERNELS = sorted(
    name
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, InterpretedFunction) and name.endswith("_kernel") and value.fn.__module__ == module.__name__
)


def launched_by_tests() -> set[str]:
    """The kernels that tests of this folder name in `@pytest.mark.launches`; the fixture in conftest.py sees to it that
    they do launch them."""
    names = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.launches":
                names |= {ast.literal_eval(argument) for argument in node.args}
    return names


def test_there_are_kernels_and_none_is_listed_twice():
    assert len(KERNELS) >= 10
    assert len(set(KERNELS)) == len(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_test_launches_it(kernel):
    assert kernel in launched_by_tests()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The table of `compile_report.py`, which cannot run in an interpreter that interprets kernels."""
    file = tmp_path_factory.mktemp("report") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-m", "raytroupe.deploy.bench.gpu.compile_report", "--json", str(file)],
        env=environment, check=True, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    return json.loads(file.read_text())["rows"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_compiles_for_ampere_and_hopper(kernel, report):
    assert {row["capability"] for row in report if row["kernel"] == kernel} == {"80", "90"}


def test_what_runs_in_every_step_spills_no_register(report):
    assert [row for row in report if row["hot"] and row["spilled"]] == []


def test_every_case_is_in_the_table(report):
    assert len(report) == sum(len(case.capabilities) for case in CASES)


def test_prompts_use_the_matrix_units_of_each_generation(report):
    prefill = [row for row in report if row["label"].startswith("prefill, bf16")]
    assert {(row["capability"], row["tensor_cores"]) for row in prefill} == {("80", "mma"), ("90", "wgmma")}
