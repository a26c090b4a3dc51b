"""Figures as pictures: PNG, SVG or PDF, by the suffix of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cluster.errors import ConfigError
from .report import Report
from .summary import METRICS, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .serve import Measured, ServeRun

SUFFIXES = (".png", ".svg", ".pdf")
NAMES = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "tpot": "time per output token",
    "e2e": "end to end",
}
QUANTILES = (("p50", "#1b6ca8"), ("p90", "#e08e0b"), ("p99", "#b3261e"))
INCHES = (11.0, 7.5)


def check_plot_file(path: Path) -> Path:
    """`path` if a plot can be written there.

    Raises:
        ConfigError: another suffix than `SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")
    return path


def plot_serve(run: ServeRun, path: Path) -> None:
    """Throughput, TTFT, ITL and E2E: over the loads of a sweep, or as distributions of a single load."""
    panels = [_throughput, *(_latency(metric) for metric in ("ttft", "itl", "e2e"))]
    if len(run.measured) == 1:
        panels = [_distribution(metric) for metric in METRICS]
    _draw(path, f"{run.options.model} over HTTP", run.measured, panels)


def plot_engine(report: Report, path: Path) -> None:
    """Prefill and decode speeds over the requests at once, with the range of the runs, and the latencies."""
    title = f"{report.settings['model']} in process, {report.settings['dtype']}"
    _draw(path, title, report.rows, [_speed("decode"), _speed("prefill"), _step("ttft_ms"), _step("itl_ms")])


def _draw(path: Path, title: str, data: Any, panels: list[Callable[[Axes, Any], None]]) -> None:
    from matplotlib.figure import Figure  # half a second to import; needs no display

    figure = Figure(figsize=INCHES, layout="constrained")
    figure.suptitle(title)
    for axes, panel in zip(figure.subplots(2, 2).flat, panels, strict=True):
        panel(axes, data)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _from_zero(axes: Axes, **properties: str) -> None:
    """The y axis from 0 on, with room above the highest point."""
    axes.set(**properties)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)


def _label_loads(axes: Axes, measured: list[Measured]) -> None:
    """Loads along the x axis, each with how many requests it lost."""
    labels = []
    for of_load in measured:
        lost = of_load.summary.rejected + of_load.summary.errors
        labels.append(of_load.load.label + (f"\n{lost} of {of_load.summary.requests} failed" if lost else ""))
    axes.set_xticks(range(len(labels)), labels)


def _throughput(axes: Axes, measured: list[Measured]) -> None:
    speeds = [of_load.summary.output_tokens_per_second for of_load in measured]
    lines = axes.plot(speeds, "o-", color="#1b6ca8", label="output tokens/s")
    _from_zero(axes, ylabel="output tokens/s", title="throughput")
    goodput = [rate for of_load in measured if (rate := of_load.summary.goodput_per_second) is not None]
    if goodput:
        other = axes.twinx()
        lines += other.plot(goodput, "s--", color="#3a7d44", label="good requests/s")
        _from_zero(other, ylabel="good requests/s")
    axes.legend(handles=lines)
    _label_loads(axes, measured)


def _latency(metric: str) -> Callable[[Axes, Any], None]:
    def panel(axes: Axes, measured: list[Measured]) -> None:
        found = [of_load.summary.latencies[metric] for of_load in measured]
        for quantile, color in QUANTILES:
            values = [getattr(figures, quantile) * 1e3 if figures else np.nan for figures in found]
            axes.plot(values, "o-", color=color, label=quantile)
        _from_zero(axes, ylabel="ms", title=NAMES[metric])
        axes.legend()
        _label_loads(axes, measured)

    return panel


def _distribution(metric: str) -> Callable[[Axes, Any], None]:
    def panel(axes: Axes, measured: list[Measured]) -> None:
        values = np.sort(values_of(measured[0].outcomes, metric)) * 1e3
        if len(values):
            axes.plot(values, np.arange(1, len(values) + 1) / len(values), color="#1b6ca8", drawstyle="steps-post")
        axes.set(xlabel="ms", ylabel="share of requests" if metric != "itl" else "share of gaps", ylim=(0, 1))
        summary = measured[0].summary
        axes.set_title(f"{NAMES[metric]} ({summary.rejected} rejected, {summary.errors} errors)")

    return panel


def _speed(name: str) -> Callable[[Axes, Any], None]:
    def panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
        middle = [row[name] for row in rows]
        below = [row[name] - row[f"{name}_min"] for row in rows]
        above = [row[f"{name}_max"] - row[name] for row in rows]
        axes.errorbar(range(len(rows)), middle, yerr=[below, above], fmt="o-", color="#1b6ca8", capsize=4)
        _from_zero(axes, xlabel="requests at once", ylabel="tokens/s", title=f"{name} (median, min – max)")
        axes.set_xticks(range(len(rows)), [str(row["concurrency"]) for row in rows])

    return panel


def _step(key: str) -> Callable[[Axes, Any], None]:
    def panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
        axes.plot([row.get(key, np.nan) for row in rows], "o-", color="#e08e0b")
        _from_zero(axes, xlabel="requests at once", ylabel="ms", title=f"{NAMES[key.partition('_')[0]]}, p50")
        axes.set_xticks(range(len(rows)), [str(row["concurrency"]) for row in rows])

    return panel
