"""Figures of the routing benchmarks, from outcomes that were made up."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from raytroupe.deploy.bench.client import Outcome
from raytroupe.deploy.bench.routing.class_figures import (
    ALONE,
    BATCH_ALONE,
    TOGETHER,
    PhaseRun,
    phase_rows,
    tokens_between,
    verdict_lines,
)
from raytroupe.deploy.bench.routing.comparison_report import publish_comparison
from raytroupe.deploy.bench.routing.figures import RunFigures, busiest, medians, run_figures
from raytroupe.deploy.bench.routing.routed_server import ReplicaCounts
from raytroupe.deploy.bench.routing.verdicts import lines, verdicts

LIMITS = {"ttft": 1.0, "tpot": 0.1}


def answered(at: float, ttft: float, tokens: int = 5, gap: float = 0.01, cached: int = 0) -> Outcome:
    times = [at + ttft + gap * index for index in range(tokens)]
    return Outcome(
        prompt_len=100,
        scheduled=at,
        sent=at,
        token_times=times,
        finished=times[-1],
        output_len=tokens,
        wanted_len=tokens,
        counted_by_usage=True,
        cached_tokens=cached,
        error=None,
    )


def refused(at: float) -> Outcome:
    return Outcome(
        prompt_len=100, scheduled=at, sent=at, finished=at, error="HTTP 429", rejected=True, detail="queue is full"
    )


def counts(replica: str, prompt: int, hits: int, generated: int) -> ReplicaCounts:
    return ReplicaCounts(replica, 64, prompt, hits, prompt, generated, 0)


def figures(**changes: float) -> RunFigures:
    base = RunFigures(
        requests=10,
        rejected=0,
        errors=0,
        hit_rate=0.5,
        counted_hit_rate=0.5,
        ttft_p50=10.0,
        ttft_p99=20.0,
        tpot_p50=1.0,
        output_tokens_per_second=100.0,
        requests_per_second=10.0,
        busiest_by_requests=1.0,
        busiest_by_tokens=1.0,
        preemptions=0,
    )
    return msgspec.structs.replace(base, **changes)


# --- replicas ---------------------------------------------------------------------------------------------------------


def test_figures_of_a_run() -> None:
    outcomes = [answered(0.0, 0.1, cached=80), answered(0.0, 0.3, cached=40), refused(0.5)]
    before = {"a": counts("a", 1000, 100, 50), "b": counts("b", 1000, 100, 50)}
    after = {"a": counts("a", 1100, 180, 55), "b": counts("b", 1100, 140, 55)}
    found = run_figures(outcomes, before, after)
    assert (found.requests, found.rejected, found.errors) == (3, 1, 0)
    assert found.hit_rate == found.counted_hit_rate == 0.6
    assert found.ttft_p50 == pytest.approx(200)
    assert found.tpot_p50 == pytest.approx(10)
    assert found.output_tokens_per_second == pytest.approx(10 / 0.5)
    assert found.busiest_by_requests == 1.0
    assert found.busiest_by_tokens == pytest.approx(65 / 45), "20 and 60 prompt tokens, and 5 generated ones each"
    assert found.failure == "queue is full"


def test_busiest_replica() -> None:
    assert busiest([5, 5, 5, 5]) == 1.0
    assert busiest([20, 0, 0, 0]) == 4.0
    assert busiest([0, 0]) == busiest([]) == 0.0


def test_medians_leave_out_runs_without_an_answer() -> None:
    runs = [figures(ttft_p50=1.0), figures(ttft_p50=5.0), figures(ttft_p50=2.0)]
    assert medians(runs).ttft_p50 == 2.0
    empty = msgspec.structs.replace(runs[0], ttft_p50=None, failure="down")
    assert medians([empty, runs[1]]).ttft_p50 == 5.0
    assert medians([empty, runs[1]]).failure == "down"
    assert medians([empty]).ttft_p50 is None


def test_aims_are_judged_against_the_best_of_the_others() -> None:
    others = {
        "round-robin": figures(hit_rate=0.2, ttft_p99=15.0),
        "prefix-affinity": figures(hit_rate=0.6, output_tokens_per_second=150.0),
    }
    ours = figures(hit_rate=0.7, ttft_p50=9.0, ttft_p99=16.0, output_tokens_per_second=160.0)
    judged = verdicts({"shared": {"troupe": ours, **others}})
    assert [verdict.met for verdict in judged] == [True, True, False, True]
    assert "70.0% against 60.0% of prefix-affinity" in judged[0].text
    assert "16.0 against 15.0 of round-robin" in judged[2].text
    assert lines(judged)[2].startswith("shared: MISSED")


def test_without_shared_prefixes_two_percent_are_no_loss() -> None:
    others = {"round-robin": figures()}
    almost = figures(ttft_p50=10.1, ttft_p99=20.3, output_tokens_per_second=98.5, hit_rate=0.0)
    assert all(verdict.met for verdict in verdicts({"unshared": {"troupe": almost, **others}}))
    worse = figures(ttft_p50=10.3, ttft_p99=20.5, output_tokens_per_second=97.5)
    assert not any(verdict.met for verdict in verdicts({"unshared": {"troupe": worse, **others}}))


def test_a_hot_prefix_must_not_make_a_hot_replica() -> None:
    ours = figures(busiest_by_requests=1.2, busiest_by_tokens=1.4)
    assert [verdict.met for verdict in verdicts({"hot": {"troupe": ours}})] == [True, False]


def test_nothing_is_judged_without_ours_or_without_others() -> None:
    assert verdicts({"shared": {"round-robin": figures()}}) == []
    assert verdicts({"shared": {"troupe": figures()}}) == []


def test_report_names_what_was_missed_and_what_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {
        "shared": {"troupe": [figures(hit_rate=0.1, counted_hit_rate=0.3)] * 2, "round-robin": [figures(errors=1)]},
        "hot": {},
    }
    missing = {"prefix-affinity": "troupe serve ended\nImportError: no pyarrow\n"}
    publish_comparison({"model": "demo-small"}, runs, missing, early=True, json_file=tmp_path / "figures.json")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["workload"], row["router"]) for row in written["rows"]] == [
        ("shared", "troupe"),
        ("shared", "round-robin"),
    ]
    assert written["notes"]["not_measured"] == missing
    printed = capsys.readouterr().out
    for line in (
        "shared: MISSED  prefix hit rate better than the best: 10.0% against 50.0% of round-robin, × 0.20",
        "ended early: the medians are of the runs until then",
        "prefix-affinity was not measured: ImportError: no pyarrow",
        "shared, round-robin: 1 requests were not answered",
        "by the replicas' counters 30.0% of the prompt tokens were hits, by the answers 10.0%",
    ):
        assert line in printed
        assert any(line in remark for remark in written["notes"]["remarks"])


# --- classes ----------------------------------------------------------------------------------------------------------


def test_tokens_in_a_window_count_events_by_what_they_carry() -> None:
    whole = answered(0.0, 1.0, tokens=4, gap=1.0)  # events at 1, 2, 3, 4
    whole.output_len = 8
    unfinished = Outcome(prompt_len=5, scheduled=0.0, sent=0.0, token_times=[0.5, 1.5, 2.5])
    assert tokens_between([whole], 2.0, 4.0) == 4
    assert tokens_between([unfinished], 1.0, 3.0) == 2
    assert tokens_between([], 0.0, 1.0) == 0


def test_classes_are_compared_with_themselves_alone() -> None:
    def batch(count: int) -> list[Outcome]:
        return [answered(0.0, 1.0, tokens=10, gap=0.1) for _ in range(count)]

    runs = [
        PhaseRun(ALONE, 0.0, 2.0, [answered(0.0, 0.1), answered(0.0, 0.1)]),
        PhaseRun(BATCH_ALONE, 0.0, 2.0, batch=batch(10)),
        PhaseRun(TOGETHER, 0.0, 2.0, [answered(0.0, 0.12), refused(0.0)], batch(7)),
        PhaseRun(TOGETHER, 0.0, 2.0, [answered(0.0, 0.14), answered(0.0, 1.2)], batch(9)),
    ]
    alone, batch_alone, together = phase_rows(runs, LIMITS)
    assert (alone["requests"], alone["good"]) == (2, 1.0)
    assert "ttft_p99" not in batch_alone
    assert batch_alone["batch_tokens_per_second"] == 50
    assert (together["requests"], together["rejected"]) == (4, 1)
    assert together["good"] == 0.5, "one was refused, one was late"
    assert together["batch_share"] == pytest.approx(0.8)
    assert together["latency_ratio"] == pytest.approx(11.8, abs=0.2)
    assert len(together["ttft_p99_of_repeats"]) == 2
    said = verdict_lines([alone, batch_alone, together])
    assert said[0].startswith("MISSED  p99 TTFT")
    assert said[1].startswith("met     batch")
    assert "both: 1 interactive requests were not answered: queue is full" in said


def test_unfinished_batch_requests_are_no_errors() -> None:
    given_up = Outcome(prompt_len=5, scheduled=0.0, sent=0.0, token_times=[0.5])
    (row,) = phase_rows([PhaseRun(BATCH_ALONE, 0.0, 1.0, batch=[given_up])], LIMITS)
    assert (row["batch_requests"], row["batch_errors"], row["batch_tokens_per_second"]) == (0, 0, 1.0)
    assert verdict_lines([row]) == []
