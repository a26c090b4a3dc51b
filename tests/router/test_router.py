"""The router keeps what it knows consistent, and a stale or hostile index costs time and never a right answer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given
from routing_fleet import Clock, card, load

from raytroupe.cluster.block_hash import short_block_hashes
from raytroupe.cluster.errors import TargetUnreachable
from raytroupe.cluster.latency_class import DEFAULT_TARGETS, LatencyTargets
from raytroupe.cluster.price import TokenPrices
from raytroupe.cluster.replica_report import StepCurve
from raytroupe.cluster.request import EngineRequest, SamplingParams
from raytroupe.cluster.router_config import EscalationConfig, RouterConfig, RuleConfig
from raytroupe.router.decision import Decision
from raytroupe.router.prompt_features import PromptFacts
from raytroupe.router.router import EXPECTED_OUTPUT_TOKENS, Router
from raytroupe.router.sessions import Sessions

TOKENS = list(range(100))
"""Six blocks of 16, and a rest."""
DEFAULT = DEFAULT_TARGETS["default"]
FACTS = PromptFacts(text="hi", chars=2, prompt_tokens=100)
CARDS = [
    card("large", weight_bytes=9, estimated_prices=TokenPrices(1e-5, 1e-5)),
    card("small", weight_bytes=1, estimated_prices=TokenPrices(1e-6, 1e-6)),
]


def make(config: RouterConfig | None = None, **options: Any) -> Router:
    router = Router(CARDS, config, clock=Clock(), **options)
    router.set_replicas("large", ["l1", "l2"])
    router.set_replicas("small", ["s1", "s2"])
    for replica in ("l1", "l2", "s1", "s2"):
        router.fleet.report(replica, load())
    return router


@pytest.fixture
def router() -> Router:
    return make()


def ask(
    router: Router,
    *models: str,
    tokens: Sequence[int] = TOKENS,
    max_tokens: int | None = 16,
    targets: LatencyTargets = DEFAULT,
    **options: Any,
) -> Decision:
    models = models or ("large",)
    return router.route(models, dict.fromkeys(models, tokens), max_tokens, targets, FACTS, **options)


def hold(router: Router, replica: str, tokens: Sequence[int] = TOKENS, salt: str = "") -> None:
    router.index.stored(replica, short_block_hashes(tokens, 16, salt))


def expected(router: Router, salt: str = "") -> dict[str, float]:
    """Tokens of the prompt that each replica of `large` has or will have."""
    found = router.survey(("large",), {"large": TOKENS}, 16, DEFAULT, cache_salt=salt)
    assert found is not None
    return {
        router.fleet.state(row).name: tokens for row, tokens in zip(found.rows, found.cached, strict=True) if tokens
    }


def request(**fields: Any) -> EngineRequest:
    return EngineRequest(**{"request_id": "r", "prompt": TOKENS, "sampling": SamplingParams(), **fields})


# --- who may answer -----------------------------------------------------------------------------------------------


def test_a_name_is_a_model_or_a_group() -> None:
    router = make(RouterConfig(groups={"cheap": ["small"]}))
    assert router.groups == {"auto": ["large", "small"], "cheap": ["small"]}


def test_without_a_fit_auto_means_the_best_model() -> None:
    assert {ask(make(), "large", "small").model for _ in range(5)} == {"large"}


def test_a_model_that_is_down_is_replaced_by_the_next_best_with_the_reason(router) -> None:
    router.set_replicas("large", [])
    decision = ask(router, "large", "small")
    assert decision.model == "small"
    assert "large down: next best" in decision.reason


def test_what_was_given_up_stands_in_the_reason(router) -> None:
    decision = ask(router, "small", given_up={"large": "down"})
    assert decision.model == "small"
    assert decision.reason.startswith("large: down; ")
    assert decision.choice.excluded == {"large": "down"}


# --- warm caches --------------------------------------------------------------------------------------------------


def test_a_request_goes_where_its_prefix_is(router) -> None:
    for replica in ("l1", "l2"):
        fresh = make()
        hold(fresh, replica)
        decision = ask(fresh)
        assert (decision.replica, decision.cached_tokens, decision.uncached_tokens) == (replica, 96, 4)


def test_prefixes_of_another_salt_are_not_known(router) -> None:
    hold(router, "l1", salt="alice")
    assert ask(router, cache_salt="alice").cached_tokens == 96
    assert ask(router, cache_salt="bob").cached_tokens == 0
    assert ask(router).cached_tokens == 0


def test_what_is_expected_of_a_request_is_known_to_its_own_salt_only(router) -> None:
    decision = ask(router, cache_salt="alice")
    router.reserve("a", decision, DEFAULT)
    assert set(expected(router, "alice")) == {decision.replica}
    assert expected(router, "bob") == expected(router) == {}


@given(
    st.dictionaries(
        st.sampled_from(["l1", "l2", "s1", "gone", "never", ""]), st.lists(st.integers(0, 1 << 59), max_size=9)
    ),
    st.sets(st.sampled_from(["l1", "l2"]), min_size=1),
)
def test_whatever_the_index_says_a_replica_that_is_up_is_chosen(blocks, up) -> None:
    router = make()
    real = short_block_hashes(TOKENS, 16, "")
    for replica, invented in blocks.items():
        router.index.stored(replica, [*real[: len(invented)], *invented])
    router.set_replicas("large", up)
    decision = ask(router)
    assert decision.replica in up
    assert 0 <= decision.cached_tokens < len(TOKENS)
    assert decision.cached_tokens + decision.uncached_tokens == len(TOKENS)


def test_models_that_see_the_same_tokens_are_looked_up_once(router, monkeypatch) -> None:
    looked_up = []
    overlaps = router.index.overlaps
    monkeypatch.setattr(router.index, "overlaps", lambda hashes: looked_up.append(hashes) or overlaps(hashes))
    ask(router, "large", "small")
    assert len(looked_up) == 1
    router.route(("large", "small"), {"large": [1] * 40, "small": [2] * 40}, 16, DEFAULT, FACTS)
    assert len(looked_up) == 3


def test_models_with_other_blocks_are_looked_up_on_their_own() -> None:
    router = Router([card("a"), card("b", block_size=8)])
    router.set_replicas("a", ["a1"])
    router.set_replicas("b", ["b1"])
    router.index.stored("a1", short_block_hashes(TOKENS, 16, ""))
    router.index.stored("b1", short_block_hashes(TOKENS, 8, "")[:5])
    found = router.survey(("a", "b"), dict.fromkeys(("a", "b"), TOKENS), 16, DEFAULT)
    assert found is not None
    assert found.cached.tolist() == [96, 40]


# --- requests on their way ----------------------------------------------------------------------------------------


def test_a_burst_of_different_prompts_spreads(router) -> None:
    chosen = Counter()
    for number in range(20):
        decision = ask(router, tokens=[number] * 100)
        router.reserve(f"r{number}", decision, DEFAULT)
        chosen[decision.replica] += 1
    assert chosen == {"l1": 10, "l2": 10}


def test_a_prompt_on_its_way_will_be_where_it_goes(router) -> None:
    first = ask(router)
    assert (first.cached_tokens, expected(router)) == (0, {})
    router.reserve("a", first, DEFAULT)
    assert set(expected(router)) == {first.replica}
    router.release("a")
    assert expected(router) == {}


def test_what_was_expected_of_a_request_is_forgotten_with_its_first_token(router) -> None:
    router.reserve("a", ask(router), DEFAULT)
    router.started("a")
    assert expected(router) == {}


def test_nothing_is_left_of_a_request_that_has_ended(router) -> None:
    router.reserve("a", ask(router), DEFAULT)
    router.reserve("b", ask(router), DEFAULT_TARGETS["batch"])
    router.started("b")
    assert router.fleet.num_reserved == 2
    for number in "aabb":
        router.release(number)
    assert router.fleet.num_reserved == 0
    assert len(router._ongoing) == 0
    assert not router._ongoing._expected
    assert not router._ongoing._demand
    router.fleet.check_integrity()


def test_deciding_reserves_nothing(router) -> None:
    ask(router)
    router.survey(("large",), {"large": TOKENS}, 16, DEFAULT)
    assert router.fleet.num_reserved == 0


def test_a_decision_without_a_replica_reserves_nothing() -> None:
    router = Router(CARDS)
    router.reserve("a", ask(router), DEFAULT)
    assert router.fleet.num_reserved == 0


def test_a_replica_that_lost_a_request_is_avoided(router) -> None:
    hold(router, "l1")
    router.lost("l1")
    assert ask(router).replica == "l2"


def test_new_and_gone_replicas_are_told_apart(router) -> None:
    assert router.set_replicas("large", ["l2", "l3"]) == ({"l3"}, {"l1"})
    assert router.set_replicas("large", ["l2", "l3"]) == (set(), set())


def test_output_is_expected_to_be_moderate(router) -> None:
    for max_tokens in (None, 4000):
        output = router.fleet.cards["large"].estimated_prices.output * EXPECTED_OUTPUT_TOKENS
        assert ask(router, max_tokens=max_tokens).price == pytest.approx(100 * 1e-5 + output)
    assert ask(router, max_tokens=3).price == pytest.approx(103e-5)


# --- sessions -----------------------------------------------------------------------------------------------------


def test_a_session_stays_with_the_model_that_answered_it() -> None:
    config = RouterConfig(rules=[RuleConfig(name="any", use=["a", "b"])])
    for model in ("a", "b"):
        router = Router([card("a"), card("b")], config)
        router.set_replicas("a", ["a1"])
        router.set_replicas("b", ["b1"])
        router.reserve("r", ask(router, model), DEFAULT, session="s")
        router.release("r")
        assert {ask(router, "a", "b", session="s").model for _ in range(3)} == {model}


def test_the_oldest_sessions_are_forgotten() -> None:
    sessions = Sessions(capacity=3)
    for name in "abc":
        sessions.record(name, "large")
    sessions.record("a", "small")
    sessions.record("d", "large")
    assert len(sessions) == 3
    assert [sessions.model_of(name) for name in "abcd"] == ["small", None, "large", "large"]


# --- a model that is decided --------------------------------------------------------------------------------------


def test_a_request_is_placed_by_its_prompt_salt_and_what_was_generated(router) -> None:
    hold(router, "l2", [*TOKENS, *range(500, 540)], salt="alice")
    assert router.place("large", request()).cached_tokens == 0
    assert router.place("large", request(cache_salt="alice")).cached_tokens == 96
    resumed = router.place("large", request(cache_salt="alice", generated=list(range(500, 540))))
    assert (resumed.replica, resumed.cached_tokens) == ("l2", 128)


def test_an_answer_that_has_begun_is_not_refused_for_being_late(router) -> None:
    for replica in ("l1", "l2"):
        router.fleet.report(replica, load(prefill_tokens=50_000))
    for name in ("default", "explicit"):
        late = LatencyTargets(name=name, ttft=0.02, tpot=0.02, refuse_late=True)
        with pytest.raises(TargetUnreachable):
            router.place("large", request(latency=late))
        assert router.place("large", request(latency=late, generated=[5])).replica is not None
    impossible = LatencyTargets(name="explicit", ttft=1e-6, tpot=1e-6, refuse_late=True)
    assert router.place("large", request(latency=impossible, generated=[5])).replica is not None


# --- shadow mode --------------------------------------------------------------------------------------------------

SMALL_FIRST = [RuleConfig(name="any", use=["small"])]
SHADOW = RouterConfig(shadow=True, rules=SMALL_FIRST)


def test_in_shadow_mode_the_best_model_answers_and_the_log_says_which_would(caplog) -> None:
    router = make(SHADOW)
    with caplog.at_level(logging.INFO, logger="raytroupe.router.router"):
        decision = ask(router, "large", "small")
    assert (decision.model, decision.shadow) == ("large", "small")
    assert decision.replica in {"l1", "l2"}
    assert "shadow mode" in decision.reason
    assert "small would answer instead of large (rule 'any'" in caplog.text


def test_in_shadow_mode_a_draft_is_not_tried() -> None:
    decision = ask(make(RouterConfig(shadow=True, escalation=EscalationConfig(draft="small"))), "large", "small")
    assert (decision.model, decision.shadow, decision.checked) == ("large", "small", False)


def test_where_the_best_would_answer_anyway_there_is_no_shadow() -> None:
    decision = ask(make(RouterConfig(shadow=True)), "large", "small")
    assert (decision.model, decision.shadow) == ("large", None)


def test_a_named_model_answers_in_shadow_mode_as_well() -> None:
    decision = ask(make(SHADOW), "small")
    assert (decision.model, decision.shadow) == ("small", None)


def test_in_shadow_mode_a_model_that_would_be_full_refuses_nobody() -> None:
    router = make(SHADOW)
    for replica in ("s1", "s2"):
        router.fleet.report(replica, load(waiting=1024))
    decision = ask(router, "large", "small")
    assert (decision.model, decision.shadow) == ("large", "small")
    for replica in ("l1", "l2"):
        router.fleet.report(replica, load(waiting=1024))
    assert ask(router, "large", "small").model == "large"


def test_in_shadow_mode_a_draft_that_would_be_late_would_not_have_been_tried(caplog) -> None:
    router = make(RouterConfig(shadow=True, escalation=EscalationConfig(draft="small")))
    for replica in ("s1", "s2"):
        router.fleet.report(replica, load(prefill_tokens=50_000))
    hurried = msgspec.structs.replace(DEFAULT, ttft=1.0, refuse_late=True)
    with caplog.at_level(logging.INFO, logger="raytroupe.router.router"):
        decision = ask(router, "large", "small", targets=hurried)
    assert (decision.model, decision.shadow) == ("large", None)
    assert caplog.text == ""


def test_in_shadow_mode_no_other_model_is_as_good_as_the_best() -> None:
    assert set(ask(make(SHADOW), "large", "small").choice.excluded) == {"small"}


def test_in_shadow_mode_a_model_that_is_down_is_replaced() -> None:
    router = make(SHADOW)
    router.set_replicas("large", [])
    decision = ask(router, "large", "small")
    assert (decision.model, decision.shadow) == ("small", None)


# --- drafts -------------------------------------------------------------------------------------------------------


def test_only_the_draft_itself_is_checked() -> None:
    router = make(RouterConfig(escalation=EscalationConfig(draft="small")))
    assert ask(router, "large", "small").checked
    assert not ask(router, "large", given_up={"small": "unsure"}).checked
    assert not ask(router, "small").checked
    router.set_replicas("small", [])
    decision = ask(router, "large", "small")
    assert (decision.model, decision.checked) == ("large", False)


# --- reports ------------------------------------------------------------------------------------------------------


def test_a_replica_that_measures_itself_slower_gets_less(router) -> None:
    router.fleet.report("l1", load(curve=StepCurve(0.1, 0.01, 0.02)))
    chosen = Counter()
    for number in range(20):
        decision = ask(router, tokens=[number] * 100)
        router.reserve(f"r{number}", decision, DEFAULT)
        chosen[decision.replica] += 1
    assert chosen["l2"] > 15
