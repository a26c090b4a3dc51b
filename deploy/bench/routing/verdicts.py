"""Which aims were met, and by how much the others were missed."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from .figures import RunFigures
from .routers import OURS

COMPARED = {
    "hit_rate": ("prefix hit rate", True),
    "ttft_p50": ("TTFT p50", False),
    "ttft_p99": ("TTFT p99", False),
    "output_tokens_per_second": ("throughput", True),
}
"""Field → what it is called, and whether more is better."""
NO_LOSS = 0.02
MOST_OF_MEAN = 1.3


class Verdict(msgspec.Struct, frozen=True):
    """One aim."""

    workload: str
    text: str
    """What was aimed at, and what was found."""
    met: bool


def verdicts(found: Mapping[str, Mapping[str, RunFigures]]) -> list[Verdict]:
    """On medians by workload and router; without ours, or without others, there is nothing to compare.

    Ours shall be better than the best of the others in each of `COMPARED`; with nothing shared, not worse by more than
    `NO_LOSS`; with one hot prefix, no replica shall be busier than `MOST_OF_MEAN` times the mean.
    """
    judged = []
    for workload, of_routers in found.items():
        ours = of_routers.get(OURS)
        if ours is None:
            continue
        for field, (name, more_is_better) in COMPARED.items():
            if workload == "unshared" and field == "hit_rate":
                continue
            if (verdict := _against_best(workload, of_routers, field, name, more_is_better)) is not None:
                judged.append(verdict)
        if workload == "hot":
            for name, value in (("requests", ours.busiest_by_requests), ("computed tokens", ours.busiest_by_tokens)):
                text = f"busiest replica at most {MOST_OF_MEAN} × the mean in {name}: {value:.2f}"
                judged.append(Verdict(workload, text, value <= MOST_OF_MEAN))
    return judged


def _against_best(
    workload: str, of_routers: Mapping[str, RunFigures], field: str, name: str, more_is_better: bool
) -> Verdict | None:
    """None if there is no value to compare."""
    values = {router: value for router, run in of_routers.items() if (value := getattr(run, field)) is not None}
    ours = values.pop(OURS, None)
    if ours is None or not values:
        return None
    best = (max if more_is_better else min)(values, key=values.__getitem__)
    theirs = values[best]
    if workload == "unshared":
        aim = f"not worse than the best by more than {NO_LOSS:.0%}"
        met = ours >= theirs * (1 - NO_LOSS) if more_is_better else ours <= theirs * (1 + NO_LOSS)
    else:
        aim = "better than the best"
        met = ours > theirs if more_is_better else ours < theirs
    shown = ".1%" if field == "hit_rate" else ",.1f"
    ratio = f", × {ours / theirs:.2f}" if theirs else ""
    return Verdict(workload, f"{name} {aim}: {ours:{shown}} against {theirs:{shown}} of {best}{ratio}", met)


def lines(judged: list[Verdict]) -> list[str]:
    """As they are printed."""
    return [f"{verdict.workload}: {'met   ' if verdict.met else 'MISSED'}  {verdict.text}" for verdict in judged]
