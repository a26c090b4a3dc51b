"""Command-line options that several benchmarks have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

DTYPE = "bfloat16"
THREADS = len(os.sched_getaffinity(0))
VOCAB_SIZE = 32_000
"""Of the benchmark model."""

ModelFolder = Annotated[Path, typer.Argument(help="Folder of the model.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests that run at once.")]
Requests = Annotated[int, typer.Option(min=1, help="Requests in one run.")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs of each side; the table has the medians.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]
