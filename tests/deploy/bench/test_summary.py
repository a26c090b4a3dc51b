"""Figures follow from what the client noted: percentiles as numpy's, failures beside them, goodput within limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.bench.client import Outcome
from raytroupe.deploy.bench.distribution import distribution
from raytroupe.deploy.bench.summary import parse_limits, summarise


def answered(scheduled: float, first: float, gaps: list[float], **fields: float) -> Outcome:
    """A complete request: `first` seconds to the first token, then `gaps`."""
    times = [float(time) for time in scheduled + first + np.cumsum([0.0, *gaps])]
    return Outcome(
        prompt_len=10,
        scheduled=scheduled,
        sent=scheduled,
        token_times=times,
        finished=times[-1],
        output_len=int(fields.get("output_len", len(times))),
        wanted_len=int(fields.get("wanted_len", len(times))),
        counted_by_usage=True,
        error=None,
    )


def failed(scheduled: float, error: str, rejected: bool = False) -> Outcome:
    return Outcome(
        prompt_len=10, scheduled=scheduled, sent=scheduled, finished=scheduled + 0.1, error=error, rejected=rejected
    )


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_those_of_numpy(values: list[float]) -> None:
    figures = distribution(values)
    assert figures is not None
    assert figures.count == len(values)
    assert (figures.p50, figures.p90, figures.p99) == tuple(np.percentile(values, [50, 90, 99]))
    assert figures.mean == pytest.approx(np.mean(values))
    assert figures.max == max(values)


def test_no_values_no_figures() -> None:
    assert distribution([]) is None


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = answered(1.0, 0.5, [0.1, 0.3])
    late.sent = 1.4
    summary = summarise([late])
    ttft, itl, tpot, e2e = (summary.latencies[metric] for metric in ("ttft", "itl", "tpot", "e2e"))
    assert ttft is not None
    assert itl is not None
    assert tpot is not None
    assert e2e is not None
    assert ttft.mean == pytest.approx(0.5)
    assert (itl.count, itl.mean, itl.max) == (2, pytest.approx(0.2), pytest.approx(0.3))
    assert tpot.mean == pytest.approx(0.2)
    assert e2e.mean == pytest.approx(0.9)
    assert summary.send_delay_p99 == pytest.approx(0.4)


def test_tpot_counts_tokens_and_itl_events() -> None:
    merged = answered(0.0, 0.1, [0.4], output_len=9)
    summary = summarise([merged])
    assert summary.latencies["tpot"].mean == pytest.approx(0.05)
    assert summary.latencies["itl"].mean == pytest.approx(0.4)
    assert summary.tokens_per_event == 4.5


def test_a_single_token_has_neither_gap_nor_tpot() -> None:
    summary = summarise([answered(0.0, 0.1, [])])
    assert summary.latencies["itl"] is None
    assert summary.latencies["tpot"] is None
    assert summary.latencies["ttft"] is not None


def test_throughput_is_over_the_whole_time() -> None:
    summary = summarise([answered(0.0, 1.0, [1.0] * 3), answered(2.0, 1.0, [1.0] * 5)])
    assert summary.seconds == 8.0
    assert summary.output_tokens_per_second == pytest.approx(10 / 8)
    assert summary.total_tokens_per_second == pytest.approx(30 / 8)
    assert summary.requests_per_second == pytest.approx(2 / 8)


def test_failures_are_counted_by_kind_and_kept_out_of_latencies() -> None:
    running = Outcome(prompt_len=10, scheduled=0.0, sent=0.0)
    summary = summarise(
        [
            answered(0.0, 0.2, [0.1]),
            failed(0.0, "HTTP 429", True),
            failed(0.0, "HTTP 429", True),
            failed(0.0, "cut off"),
            running,
        ]
    )
    assert (summary.requests, summary.completed, summary.rejected, summary.errors) == (5, 1, 2, 1)
    assert summary.failures == {"HTTP 429": 2, "cut off": 1}
    assert summary.unfinished == 1
    assert summary.latencies["ttft"].count == 1


def test_nothing_answered() -> None:
    summary = summarise([failed(0.0, "HTTP 500")], {"ttft": 1.0})
    assert summary.latencies["ttft"] is None
    assert (summary.goodput_share, summary.output_tokens_per_second) == (0.0, 0.0)
    assert summarise([]).requests == 0


def test_goodput_is_of_all_requests_that_ended() -> None:
    outcomes = [
        answered(0.0, 0.2, [0.05, 0.05]),
        answered(0.0, 0.8, [0.05]),  # first token too late
        answered(0.0, 0.2, [0.3, 0.3]),  # tokens too slow
        answered(0.0, 0.2, []),  # one token: no time per token to exceed
        failed(0.0, "HTTP 503", True),
    ]
    summary = summarise(outcomes, parse_limits("ttft:500ms,tpot:100ms"))
    assert summary.goodput_share == pytest.approx(2 / 5)
    assert summary.goodput_per_second == pytest.approx(2 / summary.seconds)
    assert summarise(outcomes).goodput_share is None
    assert summarise(outcomes, {"e2e": 0.25}).goodput_share == pytest.approx(1 / 5)
    assert summarise(outcomes, {"itl": 0.1}).goodput_share == pytest.approx(3 / 5)


def test_short_answers_and_the_way_of_counting_are_told() -> None:
    by_events = answered(0.0, 0.1, [0.1], wanted_len=8)
    by_events.counted_by_usage = False
    summary = summarise([by_events, answered(0.0, 0.1, [0.1])])
    assert (summary.shorter, summary.tokens_counted_by) == (1, "both")
    assert summarise([by_events]).tokens_counted_by == "events"


def test_limits() -> None:
    assert parse_limits("ttft:500ms, tpot:50ms,e2e:10s") == {"ttft": 0.5, "tpot": 0.05, "e2e": 10.0}
    assert parse_limits("itl:1.5ms") == {"itl": 0.0015}
    assert parse_limits("itl:250us") == {"itl": pytest.approx(0.00025)}


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft:5", "ttft:ms", "ttft:-1s", "ttft:0s", "p99:1s", "ttft:1s,ttft:2s", "ttft:1m", "e2e:infs"]
)
def test_bad_limits_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write METRIC:TIME"):
        parse_limits(text)
