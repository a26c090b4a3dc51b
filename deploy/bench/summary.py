"""From the outcomes of one measured load to its figures.

TTFT  time to first token: from the due time of a request to the first event with text
ITL   inter-token latency: between two consecutive events with text of one request
TPOT  time per output token: from the first to the last event, divided by the tokens after the first
E2E   end to end: from the due time to the end of the answer

Latencies are of the requests that were answered completely; how many were not is part of every summary, because a
server that refuses most requests answers the others fast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from ...cluster.errors import ConfigError
from .client import UNFINISHED, Outcome
from .distribution import Distribution, distribution

METRICS = ("ttft", "itl", "tpot", "e2e")
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one measured load."""

    requests: int
    """Sent, with those that failed."""
    completed: int
    rejected: int
    """Refused with 429 or 503."""
    errors: int
    """Failed in any other way."""
    failures: dict[str, int]
    """Rejections and errors by kind."""
    unfinished: int
    """Under way when the user interrupted."""
    failure_detail: str
    """What was said about the first failure."""
    seconds: float
    """From the first request to the end of the last."""
    prompt_tokens: int
    """Of completed requests, as the following counts."""
    cached_tokens: int
    output_tokens: int
    shorter: int
    """Completed requests with fewer tokens than were asked for."""
    tokens_counted_by: str
    """usage, events or both: whether the server told the number of tokens, or events with text were counted."""
    tokens_per_event: float | None
    """More than 1: the server, or the network, puts several tokens into one event, and ITL is between events."""
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    """Prompt and output."""
    latencies: dict[str, Distribution | None]
    """By the names of `METRICS`."""
    goodput_share: float | None
    """Of all requests that ended, those that were answered within the limits; None without limits."""
    goodput_per_second: float | None
    send_delay_p99: float
    """Seconds by which requests were sent late; long: the client could not keep up, and the figures are doubtful."""


def parse_limits(text: str) -> dict[str, float]:
    """`ttft:500ms,tpot:50ms,e2e:10s` to seconds by metric. `itl` limits the longest gap of a request.

    Raises:
        ConfigError: not of this form.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        metric, _, given = part.strip().partition(":")
        number = given.rstrip("mus")
        try:
            if metric not in METRICS or metric in limits:
                raise ValueError
            limits[metric] = float(number) * UNITS[given[len(number) :]]
            if not 0 < limits[metric] < float("inf"):
                raise ValueError
        except (ValueError, KeyError):
            raise ConfigError(
                f"--slo {part!r}: write METRIC:TIME with a metric of {', '.join(METRICS)}, each once, and a time such "
                "as 500ms or 10s, separated by commas"
            ) from None
    return limits


def latencies_of(outcome: Outcome) -> dict[str, float]:
    """The latencies of one complete request; `itl` is its longest gap, and those of a single token have neither."""
    first, last = outcome.token_times[0], outcome.token_times[-1]
    latencies = {"ttft": first - outcome.scheduled, "e2e": outcome.finished - outcome.scheduled}
    if outcome.output_len > 1:
        latencies["tpot"] = (last - first) / (outcome.output_len - 1)
    if len(outcome.token_times) > 1:
        latencies["itl"] = float(np.diff(outcome.token_times).max())
    return latencies


def values_of(outcomes: Sequence[Outcome], metric: str) -> list[float]:
    """All values of one latency, in seconds: one per complete request, or for `itl` one per gap."""
    completed = [outcome for outcome in outcomes if outcome.error is None]
    if metric == "itl":
        return [gap for outcome in completed for gap in np.diff(outcome.token_times).tolist()]
    return [latencies[metric] for latencies in map(latencies_of, completed) if metric in latencies]


def is_good(latencies: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether a request kept every limit; a latency that it does not have keeps its limit."""
    return all(latencies.get(metric, 0.0) <= limit for metric, limit in limits.items())


def summarise(outcomes: Sequence[Outcome], limits: Mapping[str, float] | None = None) -> Summary:
    """The figures of one load."""
    completed = [outcome for outcome in outcomes if outcome.error is None]
    failed = [outcome for outcome in outcomes if outcome.error not in (None, UNFINISHED)]
    rejected = sum(outcome.rejected for outcome in failed)
    ended = len(completed) + len(failed)
    seconds = _seconds(outcomes)
    good = sum(is_good(latencies_of(outcome), limits) for outcome in completed) if limits else 0
    prompt_tokens = sum(outcome.prompt_len for outcome in completed)
    output_tokens = sum(outcome.output_len for outcome in completed)
    events = sum(len(outcome.token_times) for outcome in completed)
    return Summary(
        requests=len(outcomes),
        completed=len(completed),
        rejected=rejected,
        errors=len(failed) - rejected,
        failures=dict(Counter(outcome.error for outcome in failed if outcome.error)),
        unfinished=len(outcomes) - ended,
        failure_detail=failed[0].detail if failed else "",
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(outcome.cached_tokens for outcome in completed),
        output_tokens=output_tokens,
        shorter=sum(outcome.output_len < outcome.wanted_len for outcome in completed),
        tokens_counted_by=_counted_by(completed),
        tokens_per_event=output_tokens / events if events else None,
        requests_per_second=_rate(len(completed), seconds),
        output_tokens_per_second=_rate(output_tokens, seconds),
        total_tokens_per_second=_rate(prompt_tokens + output_tokens, seconds),
        latencies={metric: distribution(values_of(completed, metric)) for metric in METRICS},
        goodput_share=good / ended if limits and ended else None,
        goodput_per_second=_rate(good, seconds) if limits else None,
        send_delay_p99=float(np.percentile([o.sent - o.scheduled for o in outcomes], 99)) if outcomes else 0.0,
    )


def _seconds(outcomes: Iterable[Outcome]) -> float:
    """From when the first request was due to when the last one ended."""
    ended = [outcome for outcome in outcomes if outcome.error != UNFINISHED]
    if not ended:
        return 0.0
    return max(outcome.finished for outcome in ended) - min(outcome.scheduled for outcome in ended)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _counted_by(completed: Iterable[Outcome]) -> str:
    ways = {"usage" if outcome.counted_by_usage else "events" for outcome in completed}
    return "both" if len(ways) == 2 else ways.pop() if ways else "nothing"
