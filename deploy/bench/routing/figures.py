"""From one run of a workload to its figures, and from several runs to their medians."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import msgspec

from ..client import Outcome
from ..summary import summarise
from .routed_server import ReplicaCounts


class RunFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Latencies in milliseconds, those of completed requests; None: no request was completed."""

    requests: float
    rejected: float
    errors: float
    hit_rate: float
    """Prompt tokens that came from a cache, of all, by the usage in the answers."""
    counted_hit_rate: float
    """The same, by the counters of the replicas."""
    ttft_p50: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    output_tokens_per_second: float
    requests_per_second: float
    busiest_by_requests: float
    """Requests of the busiest replica, over the mean."""
    busiest_by_tokens: float
    """The same of computed tokens, which is what a replica is busy with."""
    preemptions: float
    failure: str = ""
    """What was said about the first request that failed."""


def run_figures(
    outcomes: Sequence[Outcome], before: Mapping[str, ReplicaCounts], after: Mapping[str, ReplicaCounts]
) -> RunFigures:
    """Figures of `outcomes`, with the replicas' counters before and after."""
    summary = summarise(outcomes)
    ttft, tpot = summary.latencies["ttft"], summary.latencies["tpot"]

    def counted(field: str) -> list[int]:
        return [getattr(counts, field) - getattr(before[name], field, 0) for name, counts in after.items()]

    return RunFigures(
        requests=summary.requests,
        rejected=summary.rejected,
        errors=summary.errors + summary.unfinished,
        hit_rate=summary.cached_tokens / max(1, summary.prompt_tokens),
        counted_hit_rate=sum(counted("prefix_hits")) / max(1, sum(counted("prefix_queries"))),
        ttft_p50=ttft.p50 * 1e3 if ttft is not None else None,
        ttft_p99=ttft.p99 * 1e3 if ttft is not None else None,
        tpot_p50=tpot.p50 * 1e3 if tpot is not None else None,
        output_tokens_per_second=summary.output_tokens_per_second,
        requests_per_second=summary.requests_per_second,
        busiest_by_requests=busiest(counted("generated_tokens")),  # all outputs have the same length
        busiest_by_tokens=busiest(counted("computed_tokens")),
        preemptions=sum(counted("preemptions")),
        failure=summary.failure_detail,
    )


def busiest(work: Sequence[float]) -> float:
    """The largest over the mean: 1 if all have the same; 0 if there is nothing."""
    total = sum(work)
    return max(work) * len(work) / total if total else 0.0


def medians(runs: Sequence[RunFigures]) -> RunFigures:
    """Field by field."""
    found: dict[str, float | str | None] = {}
    for field in RunFigures.__struct_fields__:
        values = [getattr(run, field) for run in runs]
        if field == "failure":
            found[field] = next(filter(None, values), "")
        else:
            known = [value for value in values if value is not None]
            found[field] = statistics.median(known) if known else None
    return RunFigures(**found)  # type: ignore[arg-type]
