"""Command-line options that several benchmarks have in common."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from ...cluster.errors import ConfigError

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


def parse_names(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Names separated by commas, each once; `all`: all that are known.

    Raises:
        ConfigError: a name that is not known, or twice there.
    """
    known = list(known)
    names = known if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known or names.count(name) > 1:
            raise ConfigError(f"{option} {text!r}: write all, or each of {', '.join(known)} at most once")
    return names
