"""The report of `routing.replicas`: a table per workload, what became of the aims, and what the reader has to know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from ..report import Column, Report, describe
from .figures import RunFigures, medians
from .routers import OURS
from .verdicts import lines, verdicts

COLUMNS = [
    Column("router", "router"),
    Column("requests", "req", ".0f"),
    Column("rejected", "rej", ".0f"),
    Column("errors", "err", ".0f"),
    Column("hit_rate", "hits", ".1%"),
    Column("ttft_p50", "TTFT p50", ",.0f"),
    Column("ttft_p99", "p99", ",.0f"),
    Column("tpot_p50", "TPOT", ",.1f"),
    Column("busiest_by_requests", "× req", ".2f"),
    Column("busiest_by_tokens", "× tok", ".2f"),
    Column("requests_per_second", "req/s", ",.1f"),
    Column("output_tokens_per_second", "tok/s", ",.0f"),
    Column("ratio", "× best", ".2f"),
]
UNITS = ": latencies in ms; busiest replica × mean by requests and by computed tokens; × best of the others"

Runs = dict[str, dict[str, list[RunFigures]]]
"""Workload → router → runs."""


def publish_comparison(
    settings: dict[str, Any], runs: Runs, missing: Mapping[str, str], early: bool, json_file: Path | None
) -> None:
    """Print a table per workload and what became of the aims; write all of it as JSON."""
    found = {
        workload: {router: medians(of_router) for router, of_router in of_workload.items()}
        for workload, of_workload in runs.items()
        if of_workload
    }
    console = Console(width=max(130, Console().width))
    console.print(describe(settings), highlight=False, soft_wrap=True)
    all_rows = []
    for workload, of_routers in found.items():
        rows = comparison_rows(of_routers)
        console.print(Report("routing.replicas", {}, COLUMNS, rows).table(workload + UNITS))
        all_rows += [{"workload": workload, **row} for row in rows]
    judged = verdicts(found)
    said = [*lines(judged), *remarks(runs, missing, early)]
    for line in said:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if json_file is not None:
        notes = {
            "runs": msgspec.to_builtins(runs),
            "verdicts": msgspec.to_builtins(judged),
            "not_measured": dict(missing),
            "remarks": said,
        }
        columns = [Column("workload", "workload"), *COLUMNS]
        Report("routing.replicas", settings, columns, all_rows, notes).write(json_file)


def comparison_rows(of_routers: Mapping[str, RunFigures]) -> list[dict[str, Any]]:
    """A row per router; the ratio is its throughput over that of the best of those that are not ours."""
    others = [run.output_tokens_per_second for router, run in of_routers.items() if router != OURS]
    best = max(others, default=0.0)
    return [
        {
            "router": router,
            **msgspec.to_builtins(run),
            "ratio": run.output_tokens_per_second / best if best else None,
        }
        for router, run in of_routers.items()
    ]


def remarks(runs: Runs, missing: Mapping[str, str], early: bool) -> list[str]:
    """What a reader of the figures has to know."""
    said = ["ended early: the medians are of the runs until then"] if early else []
    for router, why in missing.items():
        further = " to the end" if any(router in of_routers for of_routers in runs.values()) else ""
        cause = [line for line in why.splitlines() if line.strip()]
        said.append(f"{router} was not measured{further}: {cause[-1].strip() if cause else 'no cause given'}")
    for workload, of_routers in runs.items():
        for router, of_router in of_routers.items():
            failed = int(sum(run.rejected + run.errors for run in of_router))
            if failed:
                detail = medians(of_router).failure
                said.append(f"{workload}, {router}: {failed} requests were not answered; the first one: {detail}")
            if any(abs(run.hit_rate - run.counted_hit_rate) > 0.01 for run in of_router):
                middle = medians(of_router)
                said.append(
                    f"{workload}, {router}: by the replicas' counters {middle.counted_hit_rate:.1%} of the prompt "
                    f"tokens were hits, by the answers {middle.hit_rate:.1%}"
                )
    return said
