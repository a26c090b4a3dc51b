"""Runs the parts of a GPU command one after the other, each in its own process, and shows their rows as one table."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console

from ..report import Column, Report
from .part import DEVICE, Order, Row

PACKAGE = "raytroupe.deploy.bench.gpu"
LEAST_SECONDS = 5.0
"""A part that would have less is not begun."""
TINY_SECONDS = 600.0
EXIT_NO_GPU, EXIT_INTERRUPTED = 2, 130
NO_GPU = "error: PyTorch sees no GPU here; --tiny runs the same program with tiny sizes on the CPU"
ERROR_WIDTH = 29
"""Characters of an error that the table has room for; all of it stands above the table."""
COLUMNS = [
    Column("what", "what"),
    Column("measured", "measured"),
    Column("against", "against"),
    Column("target", "target"),
    Column("ratio", "ratio", ".3f"),
]


@dataclasses.dataclass(frozen=True)
class Part:
    """One process's work."""

    name: str
    function: str
    """`module:function` of what measures; it is called with a `PartContext`."""
    seconds: float
    """It is ended after so many; with tiny sizes, which a CPU may be slow at, only the command's limit holds."""
    always: bool = False
    """Runs even if others were chosen, because they need its values."""


@dataclasses.dataclass
class Outcome:
    """All that a command has found."""

    rows: list[tuple[str, Row]] = dataclasses.field(default_factory=list)
    """(part, row)."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """That every part took."""
    interrupted: bool = False

    @property
    def known(self) -> dict[str, float]:
        """Values by key, for parts that come later."""
        return {row.key: row.value for _, row in self.rows if row.key and row.value is not None}

    @property
    def errors(self) -> int:
        """Rows that say what went wrong."""
        return sum(bool(row.error) for _, row in self.rows)

    @property
    def exit_status(self) -> int:
        """0 only if everything was measured and nothing found wrong."""
        return EXIT_INTERRUPTED if self.interrupted else int(bool(self.errors))


def run_command(
    name: str,
    parts: Sequence[Part],
    *,
    tiny: bool,
    only: str | None,
    seconds: float,
    json_file: Path | None,
    together: bool = False,
) -> int:
    """All that a command does after its options have been read; the exit status."""
    began = time.time()
    try:
        chosen = choose(parts, only)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not tiny and not has_gpu():
        typer.echo(NO_GPU, err=True)
        return EXIT_NO_GPU
    outcome = run_parts(chosen, tiny=tiny, seconds=seconds, began=began, together=together)
    show(name, outcome, json_file, tiny=tiny, began=began)
    return outcome.exit_status


def total_seconds(given: float | None, on_gpu: float, *, tiny: bool) -> float:
    """How long a command may take: what the user says; else the figure for a GPU, or for tiny sizes on any machine."""
    return given or (TINY_SECONDS if tiny else on_gpu)


def choose(parts: Sequence[Part], only: str | None) -> list[Part]:
    """The parts named in `only`, separated by commas, and those that always run; all without it.

    Raises:
        ValueError: there is no part of such a name.
    """
    if only is None:
        return list(parts)
    wanted = {name.strip() for name in only.split(",")}
    if unknown := wanted - {part.name for part in parts}:
        raise ValueError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in parts)}")
    return [part for part in parts if part.name in wanted or part.always]


def run_parts(parts: Sequence[Part], *, tiny: bool, seconds: float, began: float, together: bool) -> Outcome:
    """Run all parts, within `seconds` from `began` (time.time()) on; Ctrl-C ends it with what there is.

    Args:
        together: at the same time; then no part knows of another.
    """
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="troupe-gpu-") as folder:

        def run(part: Part) -> tuple[list[Row], float]:
            """The rows of a part and the seconds that it took."""
            left = seconds - (time.time() - began)
            if left < LEAST_SECONDS:
                return [Row(what=part.name, error=f"not begun: {seconds:.0f} s are over")], 0.0
            order = Order(
                part=part.name,
                function=part.function,
                rows=str(Path(folder) / part.name),
                known=outcome.known,
                tiny=tiny,
                seconds=left if tiny else min(part.seconds, left),
                began=began,
            )
            start = time.monotonic()
            return run_part(order), time.monotonic() - start

        with ThreadPoolExecutor(len(parts)) as pool:
            results = pool.map(run, parts) if together else map(run, parts)
            try:
                for part, (rows, spent) in zip(parts, results, strict=True):
                    outcome.rows += [(part.name, row) for row in rows]
                    outcome.seconds[part.name] = spent
            except KeyboardInterrupt:  # which the processes of the parts get as well
                outcome.interrupted = True
    return outcome


def run_part(order: Order) -> list[Row]:
    """The rows that the process of a part has written, and one more if it did not end well."""
    Path(order.rows).touch()
    command = [sys.executable, "-m", f"{PACKAGE}.part_process", msgspec.json.encode(order).decode()]
    try:
        # What a library prints goes where progress goes: standard output is for the table.
        done = subprocess.run(
            command, stdout=sys.stderr, env=environment_of_parts(), timeout=order.seconds, check=False
        )
        failure = f"its process ended with status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"ended after its {order.seconds:.0f} s"
    rows = [msgspec.json.decode(line, type=Row) for line in Path(order.rows).read_bytes().splitlines()]
    if not rows and not failure:
        failure = "nothing was measured"
    return [*rows, Row(what=order.part, error=failure)] if failure else rows


def environment_of_parts() -> dict[str, str]:
    """That of this process; without a GPU, Triton's kernels run under its interpreter, and tiny sizes in one thread."""
    offline = {"HF_HUB_OFFLINE": "1"}  # transformers would look for attention kernels on its hub
    if has_gpu():
        return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | offline
    return {"TRITON_INTERPRET": "1", "TROUPE_KERNELS": "triton", "OMP_NUM_THREADS": "1", **os.environ, **offline}


def has_gpu() -> bool:
    """Whether the parts will find a GPU."""
    import torch

    return torch.cuda.is_available()


def show(benchmark: str, outcome: Outcome, json_file: Path | None, *, tiny: bool, began: float) -> None:
    """Print the table, as the last thing, and write the same as JSON."""
    device = next((row.text for _, row in outcome.rows if row.key == DEVICE), "unknown")
    settings: dict[str, Any] = {"device": device} | ({"tiny": True} if tiny else {})
    rows = [(part, row) for part, row in outcome.rows if row.key != DEVICE]
    lines = [table_line(row) for _, row in rows]
    report = Report(benchmark, settings, COLUMNS, lines, {"seconds": outcome.seconds})
    if json_file is not None:
        full = [{"part": part, **msgspec.to_builtins(row)} for part, row in rows]
        Report(benchmark, settings, COLUMNS, full, report.notes).write(json_file)
    for _, row in rows:
        if row.error:
            Console(soft_wrap=True).print(f"{row.what}: {row.error}", highlight=False, markup=False)
    report.print()
    compared = [row for _, row in rows if row.meets_target is not None]
    met = sum(bool(row.meets_target) for row in compared)
    words = [f"{len(rows)} rows", f"{outcome.errors} errors", f"{met} of {len(compared)} targets met"]
    words += [f"{time.time() - began:.0f} s"] + (["interrupted"] if outcome.interrupted else [])
    Console().print(", ".join(words), highlight=False)


def table_line(row: Row) -> dict[str, Any]:
    """A row as the table shows it."""
    sign = "≤" if row.at_most else "≥"
    mark = {True: " ✓", False: " ✗", None: ""}[row.meets_target]
    return {
        "what": row.what,
        "measured": row.measured,
        "against": row.error[:ERROR_WIDTH] if row.error else row.against,
        "target": "" if row.target is None else f"{sign} {row.target:g}{mark}",
        "ratio": row.ratio,
    }
