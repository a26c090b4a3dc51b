"""The report of `troupe bench serve`: tables, JSON, and the remarks without which the figures would mislead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from .client import Outcome
from .report import Column, Report
from .serve import Measured, ServeRun, ServeSettings
from .summary import METRICS

LATENCY_COLUMNS = [
    Column("load", "load"),
    Column("metric", "latency, ms"),
    Column("mean", "mean", ",.1f"),
    Column("p50", "p50", ",.1f"),
    Column("p90", "p90", ",.1f"),
    Column("p99", "p99", ",.1f"),
    Column("completed", "completed", "d"),
    Column("rejected", "rejected", "d"),
    Column("errors", "errors", "d"),
]
THROUGHPUT_COLUMNS = [
    Column("load", "load"),
    Column("completed", "completed", "d"),
    Column("rejected", "rejected", "d"),
    Column("errors", "errors", "d"),
    Column("requests_per_second", "req/s", ".2f"),
    Column("output_tokens_per_second", "output tok/s", ",.1f"),
    Column("total_tokens_per_second", "all tok/s", ",.1f"),
    Column("goodput_share", "good", ".1%"),
    Column("goodput_per_second", "good/s", ".2f"),
    Column("ratio", "× first", ".2f"),
]
LATE_SECONDS = 0.05
BUSY_CLIENT = 0.5
MERGED = 1.05
OUTCOME_FIELDS = ("prompt_len", "output_len", "cached_tokens", "error", "detail")


def show(run: ServeRun, settings: ServeSettings) -> None:
    """Print both tables on standard output, then the remarks."""
    console = Console(width=max(120, Console().width))
    rows = throughput_rows(run.measured)
    columns = [column for column in THROUGHPUT_COLUMNS if any(row.get(column.key) is not None for row in rows)]
    title = f"{run.options.model} at {settings.url}"
    for part in (
        Report("bench serve", {}, LATENCY_COLUMNS, latency_rows(run.measured)).table(f"latency of {title}"),
        Report("bench serve", {}, columns, rows).table(f"throughput of {title}"),
    ):
        console.print(part)
    for remark in remarks(run):
        console.print(remark, highlight=False, markup=False)


def latency_rows(measured: list[Measured]) -> list[dict[str, Any]]:
    """A row per load and metric, in milliseconds, each with how many requests were not answered."""
    rows = []
    for of_load in measured:
        summary = of_load.summary
        counts = {"completed": summary.completed, "rejected": summary.rejected, "errors": summary.errors}
        for metric in METRICS:
            found = summary.latencies[metric]
            figures = msgspec.structs.asdict(found) if found is not None else {}
            in_ms = {name: figures[name] * 1e3 for name in ("mean", "p50", "p90", "p99") if figures}
            rows.append({"load": of_load.load.label, "metric": metric.upper(), **in_ms, **counts})
    return rows


def throughput_rows(measured: list[Measured]) -> list[dict[str, Any]]:
    """A row per load."""
    rows = []
    for of_load in measured:
        first = measured[0].summary.output_tokens_per_second
        row = {"load": of_load.load.label, **msgspec.structs.asdict(of_load.summary)}
        row["ratio"] = row["output_tokens_per_second"] / first if first else None
        rows.append(row)
    return rows


def remarks(run: ServeRun) -> list[str]:
    """What a reader of the figures has to know."""
    lines = []
    if run.interrupted:
        lines.append("Interrupted: the last load was not measured to its end.")
    for of_load in run.measured:
        summary, label = of_load.summary, of_load.load.label
        if summary.failures:
            kinds = ", ".join(f"{count} × {kind}" for kind, count in summary.failures.items())
            lines.append(f"{label}: {kinds}; the first one: {summary.failure_detail}")
        if summary.unfinished:
            lines.append(
                f"{label}: {summary.unfinished} requests were under way at the end and are not in the figures."
            )
        if summary.shorter:
            lines.append(f"{label}: {summary.shorter} of {summary.completed} answers were shorter than asked for.")
        if summary.tokens_counted_by != "usage" and summary.completed:
            lines.append(
                f"{label}: tokens were counted by {summary.tokens_counted_by}, as the server reports no usage for "
                "some requests; there may have been more."
            )
        elif (summary.tokens_per_event or 0) > MERGED:
            lines.append(f"{label}: {summary.tokens_per_event:.2f} tokens per event on average; ITL is between events.")
        if summary.cached_tokens:
            share = summary.cached_tokens / max(1, summary.prompt_tokens)
            lines.append(f"{label}: {share:.1%} of the prompt tokens came from the server's prefix cache.")
        if summary.send_delay_p99 > LATE_SECONDS:
            lines.append(f"{label}: requests were sent {summary.send_delay_p99:.2f} s late (p99): a slow client.")
        if of_load.client_cpu > BUSY_CLIENT:
            lines.append(f"{label}: this client used {of_load.client_cpu:.0%} of a core.")
    return lines


def write_json(run: ServeRun, settings: ServeSettings, path: Path) -> None:
    """Write settings, all figures, every request's own, and the machine."""
    first = min((o.scheduled for m in run.measured for o in m.outcomes), default=0.0)
    given = {
        **msgspec.to_builtins(msgspec.structs.replace(settings, headers={}), enc_hook=_plain),
        "loads": [load.label for load in settings.loads],
        "model": run.options.model,
        "ignore_eos": run.options.ignore_eos,
        "vocab_size": run.vocab_size,
        "prompt_seed": run.prompt_seed,
    }
    del given["headers"]  # may hold a key
    notes = {
        "interrupted": run.interrupted,
        "remarks": remarks(run),
        "points": [
            {
                "load": m.load.label,
                **msgspec.to_builtins(m.load),
                **msgspec.to_builtins(m.summary),
                "client_cpu": m.client_cpu,
                "requests_in_order": [_of_request(outcome, first) for outcome in m.outcomes],
            }
            for m in run.measured
        ],
    }
    rows = throughput_rows(run.measured)
    Report("bench serve", given, THROUGHPUT_COLUMNS, msgspec.to_builtins(rows), notes).write(path)


def _of_request(outcome: Outcome, start: float) -> dict[str, Any]:
    """Times in seconds after `start`."""
    times = {"scheduled": outcome.scheduled, "sent": outcome.sent, "finished": outcome.finished or None}
    return {
        **{name: at and round(at - start, 6) for name, at in times.items()},
        "token_times": [round(at - start, 6) for at in outcome.token_times],
        **{name: getattr(outcome, name) for name in OUTCOME_FIELDS},
    }


def _plain(value: Any) -> Any:
    return value.text if hasattr(value, "text") else str(value)
