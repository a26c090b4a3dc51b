"""The predicted time to the first token, with the numbers of its formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytroupe.cluster.messages import ModelCard
from raytroupe.cluster.queue_time import first_token_seconds, queue_seconds
from raytroupe.cluster.replica_report import ReplicaLoad, StepCurve
from raytroupe.router.cost import predict
from raytroupe.router.replica_state import ReplicaState

CURVE = StepCurve(base=0.01, prefill_token=0.001, decode_row=0.002)


def load(**fields: object) -> ReplicaLoad:
    idle = {
        "running": 0,
        "yielding_running": 0,
        "waiting": 0,
        "yielding_waiting": 0,
        "prefill_tokens": 0,
        "yielding_prefill_tokens": 0,
        "free_blocks": 100,
        "total_blocks": 100,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 100,
        "curve": CURVE,
        "residence": 2.0,
    }
    return ReplicaLoad(**{**idle, **fields})


def seconds(*, yields: bool = False, tokens: int = 0, **fields: object) -> float | None:
    return first_token_seconds(load(**fields), yields=yields, uncached_tokens=tokens)


def test_an_idle_replica_takes_the_steps_of_the_prompt() -> None:
    assert seconds() == 0
    assert seconds(tokens=100) == pytest.approx(0.01 + 0.1)
    assert seconds(tokens=101) == pytest.approx(2 * 0.01 + 0.101)


def test_prompts_ahead_and_rows_beside_count() -> None:
    assert seconds(tokens=50, prefill_tokens=200, running=3) == pytest.approx(3 * (0.01 + 3 * 0.002) + 0.25)


def test_slots_become_free_one_after_the_other() -> None:
    assert seconds(running=3) == 0
    assert seconds(running=4) == pytest.approx(2.0 / 4)
    assert seconds(running=4, waiting=5) == pytest.approx(6 * 2.0 / 4)
    assert seconds(running=4, residence=0.0) == 0


def test_without_free_blocks_only_what_runs_now_can_run() -> None:
    assert seconds(running=2, waiting=1) == 0
    assert seconds(running=2, waiting=1, free_blocks=0) == pytest.approx(2 * 2.0 / 2)


def test_batch_waits_for_all_and_others_not_for_batch() -> None:
    mixed = {"running": 4, "yielding_running": 3, "waiting": 6, "yielding_waiting": 6}
    tokens = {"prefill_tokens": 500, "yielding_prefill_tokens": 400}
    assert seconds(**mixed, **tokens) == pytest.approx(0.01 + 0.002 + 0.1)
    assert seconds(**mixed, **tokens, yields=True) == pytest.approx(5 * (0.01 + 4 * 0.002) + 0.5 + 7 * 2.0 / 4)


def test_without_a_curve_only_idleness_is_known() -> None:
    assert seconds(curve=None) == 0
    assert seconds(curve=None, tokens=1) is None
    assert seconds(curve=None, running=1, yielding_running=1) == 0
    assert queue_seconds(load(curve=None, running=1, yielding_running=1)) == {"interactive": 0, "default": 0}
    assert queue_seconds(load(running=4)) == {"interactive": 0.5, "default": 0.5, "batch": 0.5}


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 999), st.integers(0, 999), st.booleans())
def test_the_router_predicts_the_same(
    running: int, of_batch: int, waiting: int, tokens: int, own: int, yields: bool
) -> None:
    of_batch = min(of_batch, running)
    fields = {"running": running, "yielding_running": of_batch, "waiting": waiting, "prefill_tokens": tokens}
    card = ModelCard(name="m", path="", max_model_len=1, vocab_size=1)
    state = ReplicaState("r", 0, card, CURVE)
    state.load = load(**fields)
    ttft, _ = predict(np.array([state.row()]).T, np.array([float(own)]), now=0.0, yields=yields)
    assert ttft[0] == pytest.approx(seconds(**fields, tokens=own, yields=yields))
