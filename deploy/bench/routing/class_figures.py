"""From the phases of the comparison of latency classes to its figures.

Outcomes of all repeats of a phase are pooled, because a 99th percentile needs hundreds of requests; throughput is that
of a window in which the batch load is steady, and the median over the repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ..client import UNFINISHED, Outcome
from ..summary import summarise

ALONE, BATCH_ALONE, TOGETHER = "interactive alone", "batch alone", "both"
PHASES = (ALONE, BATCH_ALONE, TOGETHER)
MOST_OF_ALONE = 1.3
LEAST_BATCH = 0.8


class PhaseRun(msgspec.Struct, frozen=True):
    """One phase of one repeat. Times are seconds of `time.perf_counter`."""

    phase: str
    begin: float
    """Of the window in which the load was steady."""
    end: float
    interactive: list[Outcome] = []
    batch: list[Outcome] = []
    """Those that were under way at the end of the phase were given up, and are `UNFINISHED`."""

    @property
    def batch_tokens_per_second(self) -> float:
        """Output tokens within the window, of complete and of unfinished requests."""
        return tokens_between(self.batch, self.begin, self.end) / (self.end - self.begin)


def tokens_between(outcomes: Sequence[Outcome], begin: float, end: float) -> float:
    """Tokens that came within a time; an event counts as many as the request's events had on average."""
    total = 0.0
    for outcome in outcomes:
        events = sum(begin <= at < end for at in outcome.token_times)
        whole = outcome.error is None and outcome.token_times
        total += events * (outcome.output_len / len(outcome.token_times) if whole else 1.0)
    return total


def phase_rows(runs: Sequence[PhaseRun], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row per phase that was measured; latencies in milliseconds.

    Args:
        limits: what a good interactive answer keeps, in seconds by the names of `summary.METRICS`.
    """
    rows = []
    for phase in PHASES:
        of_phase = [run for run in runs if run.phase == phase]
        if not of_phase:
            continue
        row: dict[str, Any] = {"phase": phase, "repeats": len(of_phase)}
        if phase != BATCH_ALONE:
            row |= _interactive_figures([outcome for run in of_phase for outcome in run.interactive], limits)
            row["ttft_p99_of_repeats"] = [_interactive_figures(run.interactive, limits)["ttft_p99"] for run in of_phase]
        if phase != ALONE:
            ended = [one for run in of_phase for one in run.batch if one.error != UNFINISHED]
            batch = summarise(ended)
            speeds = [run.batch_tokens_per_second for run in of_phase]
            row |= {
                "batch_requests": batch.requests,
                "batch_rejected": batch.rejected,
                "batch_errors": batch.errors,
                "batch_failure": batch.failure_detail,
                "batch_tokens_per_second": statistics.median(speeds),
                "batch_tokens_per_second_of_repeats": speeds,
            }
        rows.append(row)
    _add_ratios({row["phase"]: row for row in rows})
    return rows


def verdict_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which aims were met; nothing if the phases were not all measured."""
    together = next((row for row in rows if row["phase"] == TOGETHER), {})
    said = []
    if (latency := together.get("latency_ratio")) is not None:
        met = "met   " if latency <= MOST_OF_ALONE else "MISSED"
        said.append(
            f"{met}  p99 TTFT of interactive next to batch at most {MOST_OF_ALONE} × its value alone: × {latency:.2f}"
        )
    if (share := together.get("batch_share")) is not None:
        met = "met   " if share >= LEAST_BATCH else "MISSED"
        said.append(f"{met}  batch next to interactive keeps at least {LEAST_BATCH:.0%} of its speed: {share:.1%}")
    for row in rows:
        for kind in ("", "batch_"):
            failed = row.get(f"{kind}rejected", 0) + row.get(f"{kind}errors", 0)
            if failed:
                name = "batch" if kind else "interactive"
                said.append(f"{row['phase']}: {failed} {name} requests were not answered: {row[f'{kind}failure']}")
    return said


def _interactive_figures(outcomes: Sequence[Outcome], limits: Mapping[str, float]) -> dict[str, Any]:
    summary = summarise(outcomes, limits)
    ttft, tpot = summary.latencies["ttft"], summary.latencies["tpot"]
    return {
        "requests": summary.requests,
        "rejected": summary.rejected,
        "errors": summary.errors + summary.unfinished,
        "failure": summary.failure_detail,
        "good": summary.goodput_share,
        "ttft_p50": ttft.p50 * 1e3 if ttft is not None else None,
        "ttft_p99": ttft.p99 * 1e3 if ttft is not None else None,
        "tpot_p50": tpot.p50 * 1e3 if tpot is not None else None,
    }


def _add_ratios(rows: Mapping[str, dict[str, Any]]) -> None:
    """To the row of both loads: the latency over that alone, and the share of its speed that batch keeps."""
    together = rows.get(TOGETHER)
    if together is None:
        return
    alone, now = rows.get(ALONE, {}).get("ttft_p99"), together["ttft_p99"]
    if alone and now is not None:
        together["latency_ratio"] = now / alone
    if speed := rows.get(BATCH_ALONE, {}).get("batch_tokens_per_second"):
        together["batch_share"] = together["batch_tokens_per_second"] / speed
