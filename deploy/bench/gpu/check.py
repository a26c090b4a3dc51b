"""Whether the engine is right on this GPU, in one command: `make gpu-check`.

    python -m raytroupe.deploy.bench.gpu.check
    python -m raytroupe.deploy.bench.gpu.check --only families
    python -m raytroupe.deploy.bench.gpu.check --tiny

Every kernel against its meaning in torch, also with quantised weights, the sampler against the host's, greedy tokens of
every family's tiny model against transformers', and the engine under a load that preempts, samples and shares prefixes;
these parts run at the same time. `--tiny` does less of the same on whatever device there is.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import JsonFile
from ..report import run_as_program
from .run_parts import PACKAGE, Part, run_command, total_seconds

PARTS = (
    Part("kernels", f"{PACKAGE}.kernel_check:check", seconds=100),
    Part("quantised", f"{PACKAGE}.quantised_check:check", seconds=110),
    Part("sampling", f"{PACKAGE}.sampling_check:check", seconds=60),
    Part("families", f"{PACKAGE}.engine_check:check_families", seconds=110),
    Part("load", f"{PACKAGE}.engine_check:check_mixed_load", seconds=60),
)
TOTAL_SECONDS = 150.0


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="Less of it, on whatever device there is.")] = False,
    only: Annotated[
        str | None, typer.Option(help=f"Parts, separated by commas: {', '.join(part.name for part in PARTS)}.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=1, help="Parts that do not fit in are not begun.", show_default=str(TOTAL_SECONDS)),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Check the engine on a GPU and print one table."""
    status = run_command(
        "gpu check",
        PARTS,
        tiny=tiny,
        only=only,
        seconds=total_seconds(seconds, TOTAL_SECONDS, tiny=tiny),
        json_file=json_file,
        together=True,
    )
    raise typer.Exit(status)


if __name__ == "__main__":
    run_as_program(main)
