"""Run every benchmark, one after the other, each in a process of its own: `make bench`.

Nothing else should run on the machine meanwhile. The benchmark model is made if it is not there. Tables go to standard
output, JSON to a folder.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...cluster.errors import EngineError
from .report import run_as_program

assert __package__ is not None
DEPLOY = __package__.rpartition(".")[0]
WITHOUT_MODEL = (
    "bench.scheduler",
    "bench.kv_waste",
    "bench.products",
    "bench.quantised_products",
    "bench.startup",
    "check_answers",
)
WITH_MODEL = ("bench.step", "bench.static_batches", "bench.over_http", "bench.memory")


def main(
    model: Annotated[Path, typer.Option(help="Folder of the benchmark model.")] = Path("bench-models/llama-254m"),
    results: Annotated[Path, typer.Option(help="Folder for the figures as JSON.")] = Path("bench-results"),
) -> None:
    """Run every benchmark."""
    if not (model / "config.json").exists():
        run("make_bench_model", str(model))
    for name in WITHOUT_MODEL:
        run(name, "--json", str(results / f"{name.rpartition('.')[2]}.json"))
    for name in WITH_MODEL:
        run(name, str(model), "--json", str(results / f"{name.rpartition('.')[2]}.json"))


def run(name: str, *arguments: str) -> None:
    """Run one module of `deploy/` as a program.

    Raises:
        EngineError: it failed; it has said why.
    """
    print(f"\n{name} {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", f"{DEPLOY}.{name}", *arguments]).returncode
    if code != 0:
        raise EngineError(f"{name} ended with code {code}")


if __name__ == "__main__":
    run_as_program(main)
