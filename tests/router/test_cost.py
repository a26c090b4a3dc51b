"""The cost of a replica is the formula at the head of `router/cost.py`, and every term pulls the way it should."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given
from routing_fleet import card, load

from raytroupe.cluster.latency_class import BATCH, LatencyTargets
from raytroupe.cluster.price import TokenPrices
from raytroupe.cluster.queue_time import first_token_seconds
from raytroupe.cluster.replica_report import StepCurve
from raytroupe.cluster.router_config import CostWeights
from raytroupe.router.cost import Costs, evaluate, predict
from raytroupe.router.replica_state import ReplicaState

CURVE = StepCurve(0.02, 0.001, 0.005)
PRICES = TokenPrices(1e-6, 1e-5)
TARGETS = LatencyTargets(ttft=2.0, tpot=0.1)
LOAD = {"curve": CURVE, "residence": 8.0}


def replica(
    *, model: int = 0, sent: int = 0, sent_tokens: int = 0, yielding_sent: int = 0, yielding_sent_tokens: int = 0,
    prices: TokenPrices = PRICES, **fields: Any,
) -> ReplicaState:  # fmt: skip
    """A replica with four slots and 64 tokens a step, idle but for what is given."""
    state = ReplicaState("r", model, card("m", estimated_prices=prices), None)
    state.load = load(**{**LOAD, **fields})
    state.curve = state.load.curve
    state.sent, state.sent_tokens = sent, sent_tokens
    state.yielding_sent, state.yielding_sent_tokens = yielding_sent, yielding_sent_tokens
    return state


def columns(*states: ReplicaState) -> np.ndarray:
    return np.array([state.row() for state in states]).T


def costs(
    *states: ReplicaState,
    uncached: list[int] | int = 50,
    prompt: int | None = None,
    output: float = 10,
    targets: LatencyTargets = TARGETS,
    weights: CostWeights | None = None,
    now: float = 0.0,
    **options: Any,
) -> Costs:
    tokens = np.array(uncached if isinstance(uncached, list) else [uncached] * len(states), np.float64)
    lengths = tokens if prompt is None else np.full(len(states), float(prompt))
    return evaluate(columns(*states), lengths, tokens, output, targets, weights or CostWeights(), now=now, **options)


def first_tokens(*states: ReplicaState, uncached: float = 50.0, yields: bool = False, now: float = 0.0) -> list[float]:
    return predict(columns(*states), np.full(len(states), uncached), now=now, yields=yields)[0].tolist()


def only(term: str) -> CostWeights:
    """One term of the cost alone, with weight 1."""
    return CostWeights(**{name: float(name == term) for name in CostWeights.model_fields})


# --- the formula --------------------------------------------------------------------------------------------------

COUNT = st.integers(0, 30)
TOKENS = st.integers(0, 3000)


@st.composite
def replicas(draw: st.DrawFn) -> ReplicaState:
    def with_part(name: str, kind: st.SearchStrategy[int]) -> dict[str, int]:
        number = draw(kind)
        return {name: number, f"yielding_{name}": draw(st.integers(0, number))}

    work = with_part("running", COUNT) | with_part("waiting", COUNT) | with_part("prefill_tokens", TOKENS)
    return replica(
        model=draw(st.integers(0, 1)),
        **with_part("sent", COUNT),
        **with_part("sent_tokens", TOKENS),
        **work,
        free_blocks=draw(st.integers(0, 1)),
        max_num_seqs=draw(st.integers(1, 20)),
        max_num_batched_tokens=draw(st.integers(1, 1024)),
        curve=StepCurve(draw(st.floats(0, 0.1)), draw(st.floats(0, 0.01)), draw(st.floats(0, 0.01))),
        residence=draw(st.floats(0, 60)),
        prices=TokenPrices(draw(st.floats(0, 1e-5)), draw(st.floats(0, 1e-5))),
    )


def plainly(state: ReplicaState, u: float, *, yields: bool) -> tuple[float, float]:
    """TTFT and TPOT by the docstring, one number at a time."""
    found = state.load
    curve = found.curve
    assert curve is not None
    r, w = found.running, found.waiting + state.sent
    q = found.prefill_tokens + state.sent_tokens
    slots = found.max_num_seqs
    if not found.free_blocks:
        slots = min(slots, max(1, r))
    tpot = curve.base + min(r + w + 1, slots) * curve.decode_row
    if not yields:
        r -= found.yielding_running
        w -= found.yielding_waiting + state.yielding_sent
        q -= found.yielding_prefill_tokens + state.yielding_sent_tokens
    steps = math.ceil((q + u) / found.max_num_batched_tokens)
    slot_wait = max(0, r + w + 1 - slots) * found.residence / slots
    return steps * (curve.base + min(r, slots) * curve.decode_row) + (q + u) * curve.prefill_token + slot_wait, tpot


WEIGHT = st.floats(0, 20)


@given(
    st.lists(st.tuples(replicas(), st.integers(1, 2000)), min_size=1, max_size=4),
    st.builds(CostWeights, ttft=WEIGHT, tpot=WEIGHT, late=WEIGHT, delay=WEIGHT, price=WEIGHT, switch=WEIGHT),
    st.builds(
        LatencyTargets, name=st.sampled_from(["default", BATCH]), ttft=st.floats(0.01, 9), tpot=st.floats(0.01, 9)
    ),
    st.integers(0, 256),
    st.sampled_from([None, 0, 1]),
    st.floats(1, 30),
)
def test_the_cost_is_the_sum_of_its_terms(candidates, weights, targets, output, session_model, wanted) -> None:
    states, tokens = [state for state, _ in candidates], [u for _, u in candidates]
    found = costs(
        *states, uncached=tokens, prompt=2000, output=output, targets=targets, weights=weights,
        session_model=session_model, copies_wanted=wanted,
    )  # fmt: skip
    prices = [state.card.estimated_prices.cost(2000, output) for state in states]
    mean = sum(state.load.running + state.load.waiting + state.sent for state in states) / len(states)
    for position, (state, u) in enumerate(candidates):
        ttft, tpot = plainly(state, u, yields=targets.name == BATCH)
        assert (found.ttft[position], found.tpot[position]) == pytest.approx((ttft, tpot))
        assert found.price[position] == pytest.approx(prices[position])
        late = max(0, ttft / targets.ttft - 1) + max(0, tpot / targets.tpot - 1)
        expected = weights.ttft * ttft / targets.ttft + weights.tpot * tpot / targets.tpot + weights.late * late
        expected += weights.delay * mean * u * state.load.curve.prefill_token / wanted / targets.ttft
        expected += weights.switch * (session_model is not None and session_model != state.model)
        if max(prices) > 0:
            expected += weights.price * (prices[position] - min(prices)) / max(prices)
        assert found.cost[position] == pytest.approx(expected)


@given(replicas(), st.integers(0, 2000), st.booleans())
def test_autoscaling_and_routing_mean_the_same_by_waiting(state, uncached, yields) -> None:
    state.sent = state.sent_tokens = state.yielding_sent = state.yielding_sent_tokens = 0
    expected = first_token_seconds(state.load, yields=yields, uncached_tokens=uncached)
    assert first_tokens(state, uncached=uncached, yields=yields) == [pytest.approx(expected)]


@given(replicas(), st.booleans())
def test_a_request_on_its_way_counts_like_one_that_waits_there(state, yields) -> None:
    reported = msgspec.structs.replace(
        state.load,
        waiting=state.load.waiting + state.sent,
        yielding_waiting=state.load.yielding_waiting + state.yielding_sent,
        prefill_tokens=state.load.prefill_tokens + state.sent_tokens,
        yielding_prefill_tokens=state.load.yielding_prefill_tokens + state.yielding_sent_tokens,
    )
    arrived = replica(**msgspec.structs.asdict(reported))
    assert first_tokens(state, yields=yields) == pytest.approx(first_tokens(arrived, yields=yields))


def test_a_worked_example() -> None:
    busy = replica(running=3, waiting=2, prefill_tokens=100, sent=1, sent_tokens=28)
    ttft, tpot = predict(columns(busy), np.array([72.0]), now=0.0, yields=False)
    # 200 tokens are 4 steps of 20 + 3 · 5 ms; 200 ms to compute them; 7 sequences for 4 slots: 3 · 8 s / 4.
    assert ttft[0] == pytest.approx(4 * 0.035 + 0.2 + 6.0)
    assert tpot[0] == pytest.approx(0.02 + 4 * 0.005)


def test_what_was_reported_long_ago_has_been_computed_since() -> None:
    # 64 tokens take a step of 20 + 5 ms and 64 ms for themselves: 719 tokens a second.
    busy = replica(running=1, prefill_tokens=128, sent=1, sent_tokens=30)
    step = 0.025 + 64 * 0.001
    assert first_tokens(busy, uncached=34) == [pytest.approx(3 * step)]
    assert first_tokens(busy, uncached=34, now=step) == [pytest.approx(2 * step)]
    assert first_tokens(busy, uncached=34, now=1.5 * step) == [pytest.approx(2 * 0.025 + 96 * 0.001)]
    assert first_tokens(busy, uncached=34, now=2 * step) == first_tokens(busy, uncached=34, now=1e6)
    assert first_tokens(busy, uncached=34, now=1e6) == [pytest.approx(step)]  # what was sent since is still before it


def test_a_queue_shorter_than_a_step_takes_a_whole_one() -> None:
    busy = replica(prefill_tokens=16)  # 36 ms
    assert first_tokens(busy, uncached=8, now=0.018) == [pytest.approx(0.02 + 0.008 + 0.008)]


def test_a_replica_that_fell_silent_is_not_believed_to_work_on() -> None:
    busy = replica(prefill_tokens=50_000)
    assert first_tokens(busy, now=1.0)[0] < first_tokens(busy)[0] - 0.9
    assert first_tokens(busy, now=1.0) == first_tokens(busy, now=9.0)


def test_of_batch_work_only_that_which_counts_grows_old() -> None:
    busy = replica(prefill_tokens=640, yielding_prefill_tokens=576)
    assert first_tokens(busy, uncached=64) == [pytest.approx(2 * 0.084)]
    assert first_tokens(busy, uncached=64, now=0.042) == [pytest.approx(2 * 0.02 + 96 * 0.001)]
    assert first_tokens(busy, uncached=64, now=0.084) == [pytest.approx(0.084)]
    assert first_tokens(busy, uncached=64, yields=True, now=0.084) == [pytest.approx(10 * 0.084)]


def test_prices_next_to_nothing_still_compare() -> None:
    cheap, dear = (replica(prices=TokenPrices(price, 0.0)) for price in (1e-312, 3e-312))
    assert costs(cheap, dear, weights=only("price")).cost.tolist() == pytest.approx([0, 2 / 3], abs=1e-6)


# --- the terms ----------------------------------------------------------------------------------------------------

BUSY_WITH_BATCH = {
    "running": 3,
    "waiting": 9,
    "prefill_tokens": 900,
    "sent": 2,
    "sent_tokens": 70,
    "yielding_running": 3,
    "yielding_waiting": 9,
    "yielding_prefill_tokens": 900,
    "yielding_sent": 2,
    "yielding_sent_tokens": 70,
}


def test_batch_work_does_not_stand_before_other_classes() -> None:
    idle, busy = first_tokens(replica(), replica(**BUSY_WITH_BATCH))
    assert idle == busy


def test_batch_work_stands_before_batch_work() -> None:
    idle, busy = first_tokens(replica(), replica(**BUSY_WITH_BATCH), yields=True)
    assert busy > idle


@pytest.mark.parametrize("field", ["prefill_tokens", "sent_tokens"])
def test_every_token_before_it_delays_the_first_one(field) -> None:
    found = costs(*(replica(**{field: tokens}) for tokens in (0, 1, 50, 5000)), weights=only("ttft"))
    assert (np.diff(found.cost) > 0).all()


@pytest.mark.parametrize("field", ["running", "waiting", "sent"])
def test_whoever_finds_no_slot_waits_for_one(field) -> None:
    found = costs(*(replica(**{field: count}) for count in (3, 4, 5, 50)), weights=only("ttft"))
    assert (np.diff(found.cost) > 0).all()


def test_where_no_block_is_free_there_is_no_slot_either() -> None:
    roomy, filled = first_tokens(replica(running=2), replica(running=2, free_blocks=0))
    assert filled == pytest.approx(roomy + 1 * 8.0 / 2)


@pytest.mark.parametrize("field", ["running", "waiting", "sent"])
def test_every_sequence_beside_it_slows_its_tokens_down(field) -> None:
    found = costs(*(replica(**{field: count}) for count in (0, 1, 3)), weights=only("tpot"))
    assert (np.diff(found.cost) > 0).all()


@pytest.mark.parametrize("term", ["ttft", "delay"])
def test_a_cached_prefix_saves_time_and_the_others_delay(term) -> None:
    found = costs(replica(running=1), replica(running=1), uncached=[10, 400], prompt=400, weights=only(term))
    assert found.cost[0] < found.cost[1]


def test_a_cached_prefix_makes_no_replica_of_a_model_cheaper_than_another() -> None:
    found = costs(replica(), replica(), uncached=[10, 400], prompt=400, weights=only("price"))
    assert found.cost[0] == found.cost[1]


def test_a_prompt_delays_others_only_where_there_are_others() -> None:
    assert costs(replica(), replica(), uncached=400, weights=only("delay")).cost.tolist() == [0, 0]
    few, many = (costs(replica(running=count), weights=only("delay")).cost[0] for count in (1, 3))
    assert few > 0
    assert many == pytest.approx(3 * few)


def test_a_copy_that_many_want_delays_less() -> None:
    one, ten = (costs(replica(running=2), weights=only("delay"), copies_wanted=wanted).cost[0] for wanted in (1, 10))
    assert ten == pytest.approx(one / 10)


def test_being_late_costs_only_beyond_the_target() -> None:
    found = costs(replica(prefill_tokens=1000), replica(prefill_tokens=3000), weights=only("late"))
    assert found.ttft[0] < TARGETS.ttft < found.ttft[1]
    assert found.cost[0] == 0
    assert found.cost[1] == pytest.approx(found.ttft[1] / TARGETS.ttft - 1)
    slow = costs(replica(curve=StepCurve(0.3, 0.001, 0.005)), weights=only("late"), uncached=1)
    assert slow.cost[0] == pytest.approx(0.305 / TARGETS.tpot - 1)


def test_a_dearer_model_pays_for_what_it_costs_more() -> None:
    dear = TokenPrices(4e-6, 4e-5)
    found = costs(replica(), replica(prices=dear), replica(prices=TokenPrices(2e-6, 2e-5)), weights=only("price"))
    assert found.cost.tolist() == pytest.approx([0, 0.75, 0.25])
    assert found.price.tolist() == pytest.approx([1.5e-4, 6e-4, 3e-4])


def test_the_price_of_a_single_model_does_not_blur_its_replicas() -> None:
    """Candidates are equal if their costs are close, as a share of the cost."""
    assert costs(replica(), replica(prefill_tokens=500), weights=only("price")).cost.tolist() == [0, 0]


def test_without_prices_the_price_is_no_part_of_the_cost() -> None:
    free = replica(prices=TokenPrices(0, 0))
    assert costs(free, free, weights=only("price")).cost.tolist() == [0, 0]


def test_another_model_than_the_sessions_costs_the_weight_of_a_switch() -> None:
    models = replica(model=0), replica(model=1)
    assert costs(*models, weights=only("switch"), session_model=1).cost.tolist() == [1, 0]
    assert costs(*models, weights=only("switch")).cost.tolist() == [0, 0]


def test_a_tighter_target_makes_the_same_wait_dearer() -> None:
    busy = replica(prefill_tokens=500)
    tight, loose = (costs(busy, targets=LatencyTargets(ttft=t, tpot=t)).cost[0] for t in (0.5, 5.0))
    assert tight > loose


def test_a_replica_that_takes_no_time_and_costs_nothing_costs_nothing() -> None:
    assert costs(
        replica(curve=StepCurve(0, 0, 0), residence=0.0, prices=TokenPrices(0, 0), running=9)
    ).cost.tolist() == [0]
