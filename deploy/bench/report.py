"""How every benchmark reports: a table whose ratio is the last column, and the same figures as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from ... import __version__
from ...cluster.errors import TroupeError

LIBRARIES = ("ray", "torch", "triton", "transformers", "pyzmq", "numpy")


class Column(msgspec.Struct, frozen=True):
    """One column: the key in a row, the heading with its unit, and a format specification."""

    key: str
    heading: str
    format: str = ""


class Report(msgspec.Struct):
    """The figures of one benchmark."""

    benchmark: str
    """Name of the module that measured."""
    settings: dict[str, Any]
    columns: list[Column]
    """The last one is the ratio that the benchmark is about."""
    rows: list[dict[str, Any]]
    notes: dict[str, Any] = {}
    """Further figures that have no place in the table, such as every single repeat."""

    def print(self) -> None:
        """Show the table on standard output."""
        table = self.table(f"{self.benchmark}  {describe(self.settings)}")
        Console(width=max(120, Console().width)).print(table)

    def table(self, title: str) -> Table:
        """The rows as a table."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column.heading, justify="left" if index == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(cell(row.get(column.key), column.format) for column in self.columns))
        return table

    def write(self, path: Path) -> None:
        """Write the same figures as JSON, with the versions, the machine and the date."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**msgspec.to_builtins(self), "environment": environment()}
        path.write_text(json.dumps(content, indent=2) + "\n")


def cell(value: Any, specification: str) -> str:
    """A value as it stands in the table; nothing for None."""
    return "" if value is None else format(value, specification)


def describe(settings: dict[str, Any]) -> str:
    """`key=value` pairs on one line."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def run_as_program(main: Callable[..., None]) -> None:
    """Run a benchmark's `main` with the command line as arguments; an error of ours is one line, not a traceback."""
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command()(main)
    try:
        program()
    except TroupeError as error:
        sys.exit(f"error: {error}")


def publish(report: Report, output: Path | None) -> None:
    """Print the report, and write it if `output` names a file."""
    report.print()
    if output is not None:
        report.write(output)


def environment() -> dict[str, Any]:
    """What the figures depend on: versions, processor, date."""
    return {
        "troupe": __version__,
        "python": platform.python_version(),
        **{name: version for name in LIBRARIES if (version := installed_version(name))},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "autogroup": sessions_share_cores(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def sessions_share_cores(setting: Path = Path("/proc/sys/kernel/sched_autogroup_enabled")) -> bool | None:
    """Whether Linux divides the cores between sessions first, which can hold up a load generator for a second
    (docs/measuring.md); None where there is no such setting."""
    return setting.read_text().strip() == "1" if setting.exists() else None


def installed_version(library: str) -> str | None:
    """Of a library; None if it is not there."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name; the architecture where the system does not tell."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.machine()


def measure_in_turn(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run every side `repeats` times in turn, so that a drift of the machine meets all sides alike."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            values[name].append(measure())
    return values


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` (0 to 1) of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
