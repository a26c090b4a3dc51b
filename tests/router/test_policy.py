"""Which model and replica answer: a burst spreads, a warm cache attracts until it is too busy, and no answer is refused
without a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from routing_fleet import Clock, card, load

from raytroupe.cluster.errors import InvalidRequest, TargetUnreachable
from raytroupe.cluster.latency_class import BATCH, DEFAULT_TARGETS, EXPLICIT, LatencyTargets
from raytroupe.cluster.price import TokenPrices
from raytroupe.cluster.replica_report import StepCurve
from raytroupe.cluster.router_config import CostWeights
from raytroupe.router.decision import Choice, Decision, Prompt
from raytroupe.router.fleet import Fleet
from raytroupe.router.policy import decide
from raytroupe.router.replica_state import UNKNOWN_CURVE

Send = Callable[..., Decision]
TOKENS = 320
"""Of a prompt: 20 blocks."""


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet([card("large"), card("small", block_size=32), card("tiny")], Clock())
    fleet.set_replicas("large", ["l1", "l2", "l3", "l4"])
    fleet.set_replicas("small", ["s1"])
    return fleet


@pytest.fixture
def ask(fleet) -> Send:
    """Decides for a prompt; `warm` is what replicas hold of it, in blocks."""

    def ask(
        *models: str,
        warm: Mapping[str, int] | None = None,
        tokens: int = TOKENS,
        output: float = 16,
        targets: LatencyTargets | None = None,
        weights: CostWeights | None = None,
        **options: Any,
    ) -> Decision:
        prompt = Prompt(tokens, warm or {})
        models = models or ("large",)
        prompts = dict.fromkeys(fleet.models, prompt)
        chosen = Choice(models, "as asked")
        return decide(fleet, chosen, prompts, output, targets or LatencyTargets(), weights or CostWeights(), **options)

    return ask


@pytest.fixture
def send(fleet, ask) -> Send:
    """Decides, and counts the request at once."""
    numbers = iter(range(10_000))

    def send(*models: str, **options: Any) -> Decision:
        decision = ask(*models, **options)
        assert decision.replica is not None
        fleet.reserve(f"r{next(numbers)}", decision.replica, decision.uncached_tokens, yields=False)
        return decision

    return send


def all_report(fleet: Fleet, **fields: Any) -> None:
    for model in fleet.models:
        for replica in fleet.replicas(model):
            fleet.report(replica, load(**fields))


# --- spreading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", [False, True])
def test_a_burst_of_equal_requests_spreads_evenly(fleet, send, measured) -> None:
    if measured:
        all_report(fleet)
    chosen = Counter(send().replica for _ in range(40))
    assert chosen == dict.fromkeys(["l1", "l2", "l3", "l4"], 10)


def test_idle_replicas_take_turns(fleet, ask) -> None:
    chosen = []
    for number in range(12):
        replica = ask().replica
        fleet.reserve(f"r{number}", replica, TOKENS, yields=False)
        fleet.release(f"r{number}")  # and it is done before the next one comes
        chosen.append(replica)
    assert sorted(chosen[:4]) == ["l1", "l2", "l3", "l4"]
    assert chosen == chosen[:4] * 3


def test_requests_of_different_sizes_spread_by_their_work(fleet, send) -> None:
    first = send(tokens=2000).replica
    assert first not in {send(tokens=200).replica for _ in range(9)}


def test_the_busiest_replica_gets_nothing_while_others_are_free(fleet, ask) -> None:
    all_report(fleet)
    fleet.report("l2", load(running=4, waiting=6, prefill_tokens=2000, residence=5.0))
    assert {ask().replica for _ in range(5)} <= {"l1", "l3", "l4"}


def test_deciding_counts_nothing(fleet, ask) -> None:
    rows = fleet.candidates(("large",)).tolist()
    before = [fleet.state(row).row() for row in rows]
    ask(warm={"l1": 3})
    assert [fleet.state(row).row() for row in rows] == before
    assert fleet.num_reserved == 0
    fleet.check_integrity()


# --- warm caches --------------------------------------------------------------------------------------------------


def test_where_loads_are_equal_the_warm_replica_wins(fleet, ask) -> None:
    all_report(fleet)
    decision = ask(warm={"l3": 10, "l2": 4})
    assert decision.replica == "l3"
    assert decision.cached_tokens == 160
    assert decision.uncached_tokens == TOKENS - 160
    assert "warm cache (160 tokens)" in decision.reason


def test_a_warm_replica_whose_queue_is_longer_than_what_it_saves_loses(fleet, ask) -> None:
    all_report(fleet)
    fleet.report("l3", load(prefill_tokens=150))
    assert ask(warm={"l3": 19}).replica == "l3"
    fleet.report("l3", load(prefill_tokens=3000))
    decision = ask(warm={"l3": 19})
    assert decision.replica != "l3"
    assert decision.cached_tokens == 0
    assert "spilled over: a replica with 304 tokens cached is too busy" in decision.reason


def test_a_hot_prefix_does_not_stay_on_one_replica(fleet, send) -> None:
    all_report(fleet)
    chosen = Counter(send(warm={"l3": 19}).replica for _ in range(100))
    assert chosen["l3"] == max(chosen.values())
    assert len(chosen) == 4


def test_the_last_token_of_a_prompt_is_always_computed(fleet, ask) -> None:
    assert ask(warm={"l1": 20}, tokens=320).cached_tokens == 304
    assert ask(warm={"l1": 20}, tokens=321).cached_tokens == 320
    assert ask(warm={"l1": 1}, tokens=1).cached_tokens == 0


def test_blocks_are_as_large_as_the_model_has_them(fleet, ask) -> None:
    assert ask("small", warm={"s1": 3}).cached_tokens == 96


def test_what_is_cached_of_one_models_prompt_says_nothing_of_anothers(fleet) -> None:
    """They may see the same conversation as different tokens, with a common beginning."""
    prompts = {"large": Prompt(TOKENS, {"l1": 9, "s1": 2}), "small": Prompt(TOKENS, {"s1": 8, "l1": 1})}
    for order in (["large", "small"], ["small", "large"]):
        seen = {model: prompts[model] for model in order}
        found = decide(fleet, Choice(("large", "small"), ""), seen, 16, LatencyTargets(), CostWeights()).candidates
        assert found is not None
        cached = {fleet.state(row).name: tokens for row, tokens in zip(found.rows, found.cached, strict=True)}
        assert cached == {"l1": 144, "l2": 0, "l3": 0, "l4": 0, "s1": 256}


def test_replicas_that_are_not_up_do_not_matter_in_the_index(fleet, ask) -> None:
    everywhere = ask(warm={"gone": 20, "l2": 5})
    assert everywhere.replica == "l2"
    assert ask(warm={"gone": 20}).cached_tokens == 0


# --- several models -----------------------------------------------------------------------------------------------


def priced(**prices: float) -> Fleet:
    fleet = Fleet([card(name, estimated_prices=TokenPrices(price, price)) for name, price in prices.items()], Clock())
    for name in prices:
        fleet.set_replicas(name, [f"{name}1", f"{name}2"])
    all_report(fleet)
    return fleet


def choose(fleet: Fleet, **options: Any) -> Decision:
    prompts = dict.fromkeys(fleet.models, Prompt(TOKENS, {}))
    return decide(fleet, Choice(tuple(fleet.models), ""), prompts, 16, LatencyTargets(), CostWeights(), **options)


def test_of_models_that_are_good_enough_the_cheaper_one_answers() -> None:
    assert choose(priced(large=1e-5, small=1e-6)).model == "small"


def test_a_cheap_model_that_is_far_too_busy_leaves_the_request_to_a_dear_one() -> None:
    fleet = priced(large=1e-5, small=1e-6)
    for replica in ("small1", "small2"):
        fleet.report(replica, load(running=4, waiting=50, residence=10.0))
    assert choose(fleet).model == "large"


def test_a_session_stays_with_its_model_where_the_rest_is_equal() -> None:
    fleet = priced(a=1e-6, b=1e-6)
    assert {choose(fleet, session_model="a").model for _ in range(3)} == {"a"}
    assert {choose(fleet, session_model="b").model for _ in range(3)} == {"b"}


def test_a_session_leaves_its_model_for_one_that_is_much_better() -> None:
    fleet = priced(a=1e-5, b=1e-6)
    assert choose(fleet, session_model="a").model == "b"


def test_a_session_of_a_model_that_is_not_served_any_more_is_a_new_one() -> None:
    assert choose(priced(a=1e-6), session_model="gone").model == "a"


# --- nobody is there ----------------------------------------------------------------------------------------------


def test_a_model_without_a_replica_leaves_the_request_to_the_next_best(ask) -> None:
    decision = ask("tiny", fallbacks=["small", "large"])
    assert decision.model == "small"
    assert decision.replica == "s1"
    assert decision.reason.startswith("tiny down: next best")
    assert decision.choice.models == ("tiny",)


def test_a_next_best_model_that_is_down_too_is_passed_over(fleet, ask) -> None:
    fleet.set_replicas("small", [])
    assert ask("tiny", fallbacks=["small", "large"]).model == "large"


def test_without_any_replica_the_best_model_is_named_and_none_of_its_replicas(fleet, ask) -> None:
    fleet.set_replicas("small", [])
    decision = ask("tiny", fallbacks=["small"])
    assert (decision.model, decision.replica, decision.candidates) == ("tiny", None, None)
    assert decision.prompt.tokens == decision.uncached_tokens == TOKENS
    assert "no replica of it is known" in decision.reason


def test_a_replica_that_has_just_lost_a_request_is_avoided(fleet, send) -> None:
    fleet.suspect("l1")
    assert "l1" not in {send().replica for _ in range(20)}


# --- full ---------------------------------------------------------------------------------------------------------


def test_where_one_queue_is_not_full_its_replica_gets_the_request(fleet, ask) -> None:
    all_report(fleet, waiting=1024, residence=1.0)
    fleet.report("l2", load(waiting=1023, residence=60.0, running=4, prefill_tokens=99_999))
    assert ask(warm={"l1": 19}).replica == "l2"


def test_where_all_queues_are_full_a_scheduler_decides(fleet, ask) -> None:
    for number, replica in enumerate(["l1", "l2", "l3", "l4"]):
        fleet.report(replica, load(waiting=1024, prefill_tokens=(number + 2) * 10_000))
    assert ask().replica == "l1"


# --- targets ------------------------------------------------------------------------------------------------------

PROMPT = LatencyTargets(ttft=0.5, refuse_late=True)


def test_a_target_that_nobody_can_meet_now_is_refused_with_the_time_after_which_it_can(fleet, ask) -> None:
    all_report(fleet, prefill_tokens=8000)
    with pytest.raises(TargetUnreachable, match=r"target of class default is 0\.5 s") as refused:
        ask(targets=PROMPT)
    # 8 320 tokens in 130 steps: 1.3 s + 0.832 s, of which 0.5 s may pass.
    assert refused.value.retry_after == 2
    assert ask(targets=LatencyTargets(ttft=0.5)).replica is not None


def test_one_replica_that_meets_the_target_gets_the_request(fleet, ask) -> None:
    all_report(fleet, prefill_tokens=8000)
    fleet.report("l4", load(prefill_tokens=500))
    assert ask(targets=PROMPT, warm={"l1": 19}).replica == "l4"


def test_a_full_replica_is_no_reason_to_promise_a_time(fleet, ask) -> None:
    """An idle one with a full queue would be fast enough, and cannot take the request."""
    all_report(fleet, prefill_tokens=8000)
    fleet.report("l4", load(waiting=1024, max_num_seqs=2000))
    with pytest.raises(TargetUnreachable, match=r"predicted after 2\.13 s at best") as refused:
        ask(targets=PROMPT)
    assert refused.value.retry_after == 2


def test_batch_work_does_not_make_others_late(fleet, ask) -> None:
    all_report(fleet, prefill_tokens=8000, yielding_prefill_tokens=8000)
    assert ask(targets=PROMPT).replica is not None
    with pytest.raises(TargetUnreachable):
        ask(targets=LatencyTargets(name=BATCH, ttft=0.5, refuse_late=True))


@pytest.mark.parametrize(
    ("targets", "header"),
    [({"ttft": 0.009, "tpot": 1.0}, "x-ttft-target-ms"), ({"ttft": 1.0, "tpot": 0.011}, "x-tpot-target-ms")],
)
def test_a_target_that_no_idle_replica_can_meet_is_a_mistake(fleet, ask, targets, header) -> None:
    all_report(fleet, running=3, prefill_tokens=100, waiting=2)
    explicit = LatencyTargets(name=EXPLICIT, refuse_late=True, **targets)
    with pytest.raises(InvalidRequest, match="impossible") as refused:
        ask(targets=explicit)
    assert refused.value.param == header
    assert header in refused.value.message


def test_what_can_just_be_met_is_no_mistake(fleet, ask) -> None:
    all_report(fleet)
    explicit = LatencyTargets(name=EXPLICIT, refuse_late=True, ttft=0.0102, tpot=0.0121)
    assert ask(targets=explicit, tokens=1).replica is not None


def test_only_a_measured_speed_proves_a_target_impossible(fleet, ask) -> None:
    explicit = LatencyTargets(name=EXPLICIT, refuse_late=True, ttft=0.001, tpot=0.001)
    assert explicit.ttft < UNKNOWN_CURVE.base
    with pytest.raises(TargetUnreachable):
        ask(targets=explicit)
    fleet.report("l1", load())
    with pytest.raises(TargetUnreachable):
        ask(targets=explicit)  # who knows what the others can do
    all_report(fleet)
    with pytest.raises(InvalidRequest):
        ask(targets=explicit)
    for _ in range(200):  # half of a replica's curve is the mean of its model's, which follows slowly
        fleet.report("s1", load(curve=StepCurve(0.0001, 1e-7, 1e-5)))
    assert ask("large", "small", targets=explicit).replica == "s1"


def test_an_answer_that_has_begun_goes_on_whatever_its_target_was(fleet, ask) -> None:
    """Then the router asks without `refuse_late`."""
    all_report(fleet)
    assert ask(targets=LatencyTargets(name=EXPLICIT, ttft=0.001, tpot=0.001)).replica is not None


def test_a_class_with_a_configured_target_is_never_the_clients_mistake(fleet, ask) -> None:
    all_report(fleet)
    with pytest.raises(TargetUnreachable):
        ask(targets=LatencyTargets(ttft=0.001, refuse_late=True))


# --- odd numbers --------------------------------------------------------------------------------------------------

ODD = [
    StepCurve(0.0, 0.0, 0.0),
    StepCurve(float("nan"), float("nan"), float("nan")),
    StepCurve(float("inf"), 0.0, 0.0),
    StepCurve(1e308, 1e308, 1e308),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("curve", ODD, ids=str)
@pytest.mark.parametrize("targets", DEFAULT_TARGETS.values(), ids=lambda targets: targets.name)
def test_one_replicas_odd_numbers_do_not_disturb_the_others(fleet, ask, curve, targets) -> None:
    all_report(fleet)
    fleet.report("l1", load(curve=curve, running=2, residence=float("inf")))
    for _ in range(5):
        assert ask(targets=targets).replica in {"l1", "l2", "l3", "l4"}
    if curve.base == 1e308:
        assert ask(targets=targets, weights=CostWeights(delay=0)).replica != "l1"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("curve", ODD, ids=str)
def test_odd_numbers_everywhere_still_give_a_decision(fleet, ask, curve) -> None:
    all_report(fleet, curve=curve, residence=float("inf"))
    assert ask().replica in {"l1", "l2", "l3", "l4"}
