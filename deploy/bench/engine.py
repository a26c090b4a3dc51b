"""`troupe bench engine`: the engine in this process, without Ray and HTTP, at several numbers of requests at once."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from ...actors.local_engine import LocalEngine
from ...cluster.errors import ConfigError
from ..model_folder import DEMO_MODELS, find_model_folder
from .engine_points import WARM_UP, Run, run_point, timed
from .peers.points import LOWEST_TOKEN, Point
from .report import Column, Report, environment

BENCH_MODEL = Path("bench-models/llama-254m")
DEFAULT_BUDGET = 2048
"""Tokens per step, as the peers have it in `peers/`."""
SPEEDS = {"prefill": "prefill_tok_s", "decode": "decode_tok_s", "total": "total_tok_s"}
COLUMNS = [
    Column("concurrency", "at once", "d"),
    Column("prefill", "prefill tok/s", ",.1f"),
    Column("decode", "decode tok/s", ",.1f"),
    Column("decode_range", "min – max"),
    Column("total", "output tok/s", ",.1f"),
    Column("ttft_ms", "TTFT ms", ",.1f"),
    Column("itl_ms", "ITL ms", ",.2f"),
    Column("itl_p99_ms", "ITL p99", ",.2f"),
    Column("ratio", "× first", ".2f"),
]


class EngineSettings(msgspec.Struct, kw_only=True):
    """What the user wants measured."""

    model: str | None
    """None: the benchmark model."""
    concurrency: list[int]
    prompt: int
    output: int
    repeats: int
    fields: dict[str, Any]
    """Fields of `ModelConfig` that the user gave."""


def resolve_model(model: str | None, console: Console) -> Path:
    """The folder of a model: a path, a hub id, the name of an embedded model, or by default the benchmark model.

    The benchmark model is written if it is not there.

    Raises:
        CheckpointError: no such model.
    """
    if model is None:
        if not (BENCH_MODEL / "config.json").exists():
            from ..make_bench_model import write_model

            console.print(f"writing the benchmark model to {BENCH_MODEL}", style="dim", highlight=False)
            write_model(BENCH_MODEL)
        return BENCH_MODEL
    embedded = {Path(folder).name: Path(folder) for folder in DEMO_MODELS}
    if model in embedded and not Path(model).is_dir():
        return embedded[model]
    return find_model_folder(model)


def run(settings: EngineSettings, console: Console) -> Report:
    """Measure every point `repeats` times in turn; Ctrl-C ends it with what has been measured.

    Raises:
        ConfigError: a field that cannot work. CheckpointError: no such model.
    """
    points = [Point(count, settings.prompt, settings.output) for count in settings.concurrency]
    folder = resolve_model(settings.model, console)
    widest = max(settings.concurrency)
    fields = {
        "dtype": "bfloat16",
        "max_num_seqs": widest,
        "max_num_batched_tokens": max(DEFAULT_BUDGET, widest),
        "max_model_len": max(settings.prompt + settings.output, sum(WARM_UP[1:])),
        "enable_prefix_caching": False,
        **settings.fields,
    }
    runs: dict[int, list[Run]] = {point.concurrency: [] for point in points}
    interrupted = False
    with LocalEngine(folder, **fields) as engine, Progress(console=console, transient=True) as progress:
        vocab_size = engine.shard.spec.vocab_size
        if vocab_size <= LOWEST_TOKEN:
            raise ConfigError(f"{folder}: a vocabulary of {vocab_size}; more than {LOWEST_TOKEN} tokens are needed")
        bar = progress.add_task(folder.name, total=settings.repeats * len(points))
        try:
            timed(engine, WARM_UP, vocab_size)
            for _ in range(settings.repeats):
                for point in points:
                    progress.update(bar, description=f"{folder.name}: {point.concurrency} at once")
                    runs[point.concurrency].append(run_point(engine, point, vocab_size))
                    progress.advance(bar)
        except KeyboardInterrupt:
            interrupted = True
        dtype = str(engine.shard.dtype).removeprefix("torch.")
    shown = {
        "model": folder.name,
        "prompt": settings.prompt,
        "output": settings.output,
        "repeats": settings.repeats,
        **fields,
        "dtype": dtype,
    }
    rows = [row(point, runs[point.concurrency]) for point in points if runs[point.concurrency]]
    for figures in rows:
        figures["ratio"] = figures["decode"] / rows[0]["decode"]
    notes = {"runs": {str(count): msgspec.to_builtins(of_point) for count, of_point in runs.items()}}
    return Report("bench engine", shown, COLUMNS, rows, {**notes, "interrupted": interrupted})


def row(point: Point, runs: list[Run]) -> dict[str, Any]:
    """The medians of a point's runs, with the least and the greatest value of every speed."""
    figures: dict[str, Any] = {"concurrency": point.concurrency}
    for name, key in SPEEDS.items():
        values = [run.speeds(point)[key] for run in runs]
        figures[name] = statistics.median(values)
        figures[f"{name}_min"], figures[f"{name}_max"] = min(values), max(values)
        figures[f"{name}_range"] = f"{min(values):,.1f} – {max(values):,.1f}"
    if all(run.ttft is not None and run.itl is not None for run in runs):
        figures["ttft_ms"] = statistics.median(run.ttft.p50 for run in runs if run.ttft) * 1e3
        figures["itl_ms"] = statistics.median(run.itl.p50 for run in runs if run.itl) * 1e3
        figures["itl_p99_ms"] = statistics.median(run.itl.p99 for run in runs if run.itl) * 1e3
    return figures


def show(report: Report) -> None:
    """Print the table on standard output, with the machine, as the figures depend on it."""
    report.print()
    machine = environment()
    console = Console()
    console.print(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}", highlight=False)
    if report.notes["interrupted"]:
        console.print("Interrupted: some points have fewer runs or none.", highlight=False)
