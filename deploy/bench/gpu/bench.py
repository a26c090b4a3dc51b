"""Ceilings, kernels, engine and transformers on one GPU, in one command and one table: `make gpu-bench`.

    python -m raytroupe.deploy.bench.gpu.bench --json results.json
    python -m raytroupe.deploy.bench.gpu.bench --only kernels
    python -m raytroupe.deploy.bench.gpu.bench --tiny

Needs neither Ray nor a network nor a checkpoint: models are shapes with random weights. `--tiny` runs the same program
with tiny sizes on whatever device there is, which proves that it works and measures nothing.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import JsonFile
from ..report import run_as_program
from .run_parts import PACKAGE, Part, run_command, total_seconds

PARTS = (
    Part("ceilings", f"{PACKAGE}.ceilings:measure", seconds=45, always=True),
    Part("kernels", f"{PACKAGE}.kernel_points:measure", seconds=100),
    Part("quantised", f"{PACKAGE}.quantised_points:measure", seconds=100),
    Part("llama-8b", f"{PACKAGE}.engine_points_gpu:measure_llama", seconds=110),
    Part("qwen-0.6b", f"{PACKAGE}.engine_points_gpu:measure_qwen", seconds=110),
    Part("transformers", f"{PACKAGE}.transformers_points:measure", seconds=120),
)
TOTAL_SECONDS = 430.0


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny sizes on whatever device there is.")] = False,
    only: Annotated[
        str | None, typer.Option(help=f"Parts, separated by commas: {', '.join(part.name for part in PARTS)}.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=1, help="Parts that do not fit in are not begun.", show_default=str(TOTAL_SECONDS)),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure on a GPU and print one table."""
    raise typer.Exit(
        run_command(
            "gpu bench",
            PARTS,
            tiny=tiny,
            only=only,
            seconds=total_seconds(seconds, TOTAL_SECONDS, tiny=tiny),
            json_file=json_file,
        )
    )


if __name__ == "__main__":
    run_as_program(main)
