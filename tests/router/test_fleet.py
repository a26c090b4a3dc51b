"""What an ingress knows of its replicas stays right, whatever order lists, reports and requests come in."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from routing_fleet import CURVE, Clock, card, load

from raytroupe.cluster.price import TokenPrices, token_prices
from raytroupe.cluster.replica_report import StepCurve
from raytroupe.router.fleet import RESERVATION_SECONDS, SUSPECT_SECONDS, Fleet
from raytroupe.router.replica_state import UNKNOWN_CURVE, Column, ReplicaState


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fleet(clock: Clock) -> Fleet:
    fleet = Fleet([card("large"), card("small", block_size=32)], clock)
    fleet.set_replicas("large", ["l1", "l2"])
    fleet.set_replicas("small", ["s1"])
    return fleet


def state(fleet: Fleet, replica: str) -> ReplicaState:
    row = fleet.row(replica)
    assert row is not None
    return fleet.state(row)


def value(fleet: Fleet, replica: str, column: int) -> float:
    """What `check_integrity` compares with the fleet's table."""
    return state(fleet, replica).row()[column]


def sent(fleet: Fleet, replica: str) -> list[int]:
    """Requests on their way there, the yielding part, and the same in tokens."""
    found = state(fleet, replica)
    return [found.sent, found.yielding_sent, found.sent_tokens, found.yielding_sent_tokens]


def names(fleet: Fleet, *models: str) -> list[str]:
    return [fleet.state(row).name for row in fleet.candidates(models)]


# --- which replicas there are -------------------------------------------------------------------------------------


def test_candidates_are_the_replicas_of_the_models_asked_for(fleet) -> None:
    assert sorted(names(fleet, "large")) == ["l1", "l2"]
    assert names(fleet, "small") == ["s1"]
    assert sorted(names(fleet, "small", "large")) == ["l1", "l2", "s1"]


def test_candidates_follow_every_change_of_the_list(fleet) -> None:
    assert sorted(names(fleet, "large")) == ["l1", "l2"]
    assert fleet.set_replicas("large", ["l2", "l3"]) == {"l3"}
    assert sorted(names(fleet, "large")) == ["l2", "l3"]
    assert fleet.set_replicas("large", ["l2", "l3"]) == set()
    fleet.set_replicas("large", [])
    assert names(fleet, "large") == []
    assert names(fleet, "small", "large") == ["s1"]


def test_candidates_are_found_once_for_every_set_of_models(fleet) -> None:
    assert fleet.candidates(("large",)) is fleet.candidates(("large",))


def test_the_row_of_a_replica_that_left_is_used_again_and_has_nothing_of_it(fleet) -> None:
    fleet.report("s1", load(running=3, prefill_tokens=500))
    fleet.reserve("r", "s1", 100, yields=True)
    row = fleet.row("s1")
    fleet.set_replicas("small", [])
    assert fleet.row("s1") is None
    fleet.set_replicas("large", ["l1", "l2", "l3"])
    assert fleet.row("l3") == row
    assert fleet.models[int(value(fleet, "l3", Column.MODEL))] == "large"
    assert value(fleet, "l3", Column.PRESENT) == value(fleet, "l3", Column.QUEUED) == 0
    assert sent(fleet, "l3") == [0, 0, 0, 0]
    fleet.release("r")
    assert sent(fleet, "l3") == [0, 0, 0, 0]
    fleet.check_integrity()


def test_the_table_grows_with_the_fleet(fleet) -> None:
    fleet.reserve("r", "l1", 7, yields=False)
    fleet.set_replicas("small", [f"s{number}" for number in range(100)])
    assert len(set(fleet.candidates(("small", "large")).tolist())) == 102
    assert sent(fleet, "l1") == [1, 0, 7, 0]
    fleet.check_integrity()


def test_a_suspect_gets_nothing_for_a_while(fleet, clock) -> None:
    fleet.suspect("l1")
    assert names(fleet, "large") == ["l2"]
    clock.now += SUSPECT_SECONDS - 0.01
    assert names(fleet, "large") == ["l2"]
    clock.now += 0.02
    assert sorted(names(fleet, "large")) == ["l1", "l2"]


def test_a_suspect_is_trusted_again_when_its_time_is_over(fleet, clock) -> None:
    fleet.suspect("l1")
    assert fleet.trusts("large")
    fleet.suspect("l2")
    assert not fleet.trusts("large")
    assert fleet.trusts("small")
    clock.now += SUSPECT_SECONDS + 0.01
    assert fleet.trusts("large")
    fleet.set_replicas("large", [])
    assert not fleet.trusts("large")


def test_where_all_are_suspects_all_are_candidates(fleet) -> None:
    fleet.suspect("l1")
    fleet.suspect("l2")
    assert sorted(names(fleet, "large")) == ["l1", "l2"]


def test_a_suspect_that_left_and_came_back_is_trusted(fleet) -> None:
    fleet.suspect("l1")
    fleet.suspect("gone")
    fleet.set_replicas("large", ["l2"])
    fleet.set_replicas("large", ["l1", "l2"])
    assert sorted(names(fleet, "large")) == ["l1", "l2"]


# --- load ---------------------------------------------------------------------------------------------------------


def test_a_report_replaces_the_one_before(fleet) -> None:
    for reported in (load(running=9, waiting=8, prefill_tokens=7), load(running=1, waiting=2, prefill_tokens=3)):
        fleet.report("l2", reported)
        assert state(fleet, "l2").load == reported
    assert value(fleet, "l2", Column.QUEUED) == 3
    assert value(fleet, "l2", Column.PRESENT) == 3
    assert value(fleet, "l1", Column.PRESENT) == 0


def test_a_new_replica_is_idle_and_has_the_limits_that_its_model_was_configured_with() -> None:
    fleet = Fleet([card("m", max_num_seqs=3, max_num_batched_tokens=17, max_num_waiting=5)])
    fleet.set_replicas("m", ["r"])
    found = state(fleet, "r")
    assert (found.load.max_num_seqs, found.load.max_num_batched_tokens) == (3, 17)
    assert found.waiting == found.queued_tokens == found.load.running == 0
    assert value(fleet, "r", Column.OVER) == -2  # three slots, of which the next request takes one


def test_a_replica_is_full_as_soon_as_those_that_wait_and_those_on_their_way_are_too_many() -> None:
    fleet = Fleet([card("m", max_num_waiting=3)])
    fleet.set_replicas("m", ["r", "other"])
    fleet.report("r", load(waiting=2))
    assert not state(fleet, "r").full
    fleet.reserve("a", "r", 5, yields=False)
    assert state(fleet, "r").full
    assert fleet.num_full == 1
    fleet.report("r", load(waiting=1))
    assert not state(fleet, "r").full
    fleet.report("r", load(waiting=3))
    fleet.set_replicas("m", ["other"])
    assert fleet.num_full == 0
    fleet.check_integrity()


def test_a_report_of_a_replica_that_is_not_listed_changes_nothing_but_what_it_has_accepted(fleet) -> None:
    fleet.reserve("r", "l1", 5, yields=False)
    fleet.report("stranger", load(running=4))
    assert fleet.row("stranger") is None
    assert sent(fleet, "l1") == [1, 0, 5, 0]
    assert value(fleet, "l1", Column.PRESENT) == 1
    fleet.report("stranger", load(running=4), ["r"])
    assert fleet.num_reserved == 0
    fleet.check_integrity()


def test_a_request_counts_until_a_report_has_it(fleet) -> None:
    fleet.reserve("a", "l1", 100, yields=False)
    fleet.reserve("b", "l1", 20, yields=True)
    assert sent(fleet, "l1") == [2, 1, 120, 20]
    fleet.report("l1", load(waiting=1, prefill_tokens=100))
    assert sent(fleet, "l1") == [2, 1, 120, 20]
    fleet.report("l1", load(waiting=1, prefill_tokens=100), ["a"])
    assert sent(fleet, "l1") == [1, 1, 20, 20]
    fleet.release("b")
    fleet.release("b")
    assert sent(fleet, "l1") == [0, 0, 0, 0]


def test_serve_may_give_a_request_to_another_replica_than_was_chosen(fleet) -> None:
    fleet.reserve("r", "l1", 100, yields=False)
    fleet.report("l2", load(waiting=1), ["r"])
    assert sent(fleet, "l1") == sent(fleet, "l2") == [0, 0, 0, 0]


def test_a_request_that_is_sent_again_counts_once(fleet) -> None:
    fleet.reserve("r", "l1", 100, yields=False)
    fleet.reserve("r", "l2", 60, yields=True)
    assert sent(fleet, "l1") == [0, 0, 0, 0]
    assert sent(fleet, "l2") == [1, 1, 60, 60]


def test_a_reservation_at_a_replica_that_is_gone_is_none(fleet) -> None:
    fleet.reserve("r", "gone", 100, yields=False)
    assert fleet.num_reserved == 0
    fleet.reserve("r", "l1", 100, yields=False)
    fleet.set_replicas("large", ["l2"])
    assert fleet.num_reserved == 0
    fleet.release("r")
    fleet.check_integrity()


def test_a_reservation_that_nobody_releases_expires_even_if_no_other_is_made(fleet, clock) -> None:
    fleet.reserve("old", "l1", 100, yields=False)
    clock.now += RESERVATION_SECONDS / 2
    fleet.reserve("young", "l1", 10, yields=False)
    clock.now += RESERVATION_SECONDS / 2 + 1
    fleet.candidates(("large",))
    assert sent(fleet, "l1") == [1, 0, 10, 0]
    fleet.check_integrity()


def test_a_reservation_that_was_renewed_expires_by_its_last_date(fleet, clock) -> None:
    fleet.reserve("a", "l1", 100, yields=False)
    clock.now += 1
    fleet.reserve("b", "l1", 10, yields=False)
    clock.now += RESERVATION_SECONDS / 2
    fleet.reserve("a", "l1", 100, yields=False)
    clock.now += RESERVATION_SECONDS / 2 + 1
    fleet.candidates(("large",))
    assert sent(fleet, "l1") == [1, 0, 100, 0]


# --- speed and price ----------------------------------------------------------------------------------------------


def curve_of(fleet: Fleet, replica: str) -> StepCurve | None:
    """What it has measured, None: nothing. The row is made of it, or of a guess."""
    curve = state(fleet, replica).curve
    used = curve or UNKNOWN_CURVE
    assert value(fleet, replica, Column.PREFILL_TOKEN) == used.prefill_token
    assert value(fleet, replica, Column.TPOT) == pytest.approx(used.seconds(0, 1))
    return curve


def test_a_replica_that_has_measured_nothing_is_taken_to_be_like_the_others_of_its_model(fleet) -> None:
    assert curve_of(fleet, "l1") is None
    fleet.report("l1", load())
    fleet.report("l2", load(curve=None))
    fleet.set_replicas("large", ["l1", "l2", "l3"])
    for replica in ("l1", "l2", "l3"):
        assert curve_of(fleet, replica) == CURVE
    assert curve_of(fleet, "s1") is None


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.001])
@pytest.mark.parametrize("part", ["base", "prefill_token", "decode_row"])
def test_a_curve_that_makes_no_sense_counts_as_not_measured(fleet, part, wrong) -> None:
    nonsense = StepCurve(**{"base": 0.01, "prefill_token": 0.01, "decode_row": 0.01, part: wrong})
    fleet.report("l1", load(curve=nonsense, residence=math.nan))
    assert curve_of(fleet, "l1") is None
    assert value(fleet, "l1", Column.PLACE_SECONDS) == 0
    fleet.report("l2", load())
    fleet.report("l1", load(curve=nonsense))
    assert curve_of(fleet, "l1") == CURVE


def prices_of(fleet: Fleet, replica: str) -> tuple[float, float]:
    return value(fleet, replica, Column.PROMPT_PRICE), value(fleet, replica, Column.OUTPUT_PRICE)


def test_a_price_per_hour_is_shared_by_the_tokens_of_the_measured_speed() -> None:
    fleet = Fleet([card("m", price_per_hour=3.6, max_num_seqs=10)])
    fleet.set_replicas("m", ["r"])
    assert prices_of(fleet, "r") == pytest.approx((1e-3 * 0.0002, 1e-3 * (0.02 / 10 + 0.001)))
    fleet.report("r", load())
    assert prices_of(fleet, "r") == pytest.approx((1e-3 * 0.0001, 1e-3 * (0.01 / 10 + 0.002)))
    expected = token_prices(3.6, CURVE, 10)
    assert prices_of(fleet, "r") == (expected.prompt, expected.output)


def test_without_a_price_per_hour_the_estimate_stays() -> None:
    fleet = Fleet([card("m", estimated_prices=TokenPrices(1e-7, 4e-7, estimated=True))])
    fleet.set_replicas("m", ["r"])
    fleet.report("r", load())
    assert prices_of(fleet, "r") == (1e-7, 4e-7)


# --- any order ----------------------------------------------------------------------------------------------------

REPLICAS = {"large": ["l1", "l2", "l3"], "small": ["s1", "s2"]}
ALL = st.sampled_from([name for members in REPLICAS.values() for name in members])
IDS = st.sampled_from("abcdefgh")


class AnyOrder(RuleBasedStateMachine):
    """Beside the fleet a plain record of who was sent where, from which all sums are made anew."""

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.fleet = Fleet([card("large"), card("small", max_num_waiting=2)], self.clock)
        self.up: dict[str, str] = {}
        self.held: dict[str, tuple[str, int, bool, float]] = {}

    def forget_old(self) -> None:
        limit = self.clock.now - RESERVATION_SECONDS
        self.held = {key: held for key, held in self.held.items() if held[3] > limit}

    @rule(model=st.sampled_from(list(REPLICAS)), data=st.data())
    def list_replicas(self, model: str, data: st.DataObject) -> None:
        listed = data.draw(st.sets(st.sampled_from(REPLICAS[model])))
        new = self.fleet.set_replicas(model, listed)
        assert new == {name for name in listed if name not in self.up}
        self.up = {name: of for name, of in self.up.items() if of != model or name in listed}
        self.up |= dict.fromkeys(listed, model)
        self.held = {key: held for key, held in self.held.items() if held[0] in self.up}

    @rule(request=IDS, replica=ALL, tokens=st.integers(0, 500), yields=st.booleans())
    def reserve(self, request: str, replica: str, tokens: int, yields: bool) -> None:
        self.fleet.reserve(request, replica, tokens, yields=yields)
        self.held.pop(request, None)
        if replica in self.up:
            self.held[request] = (replica, tokens, yields, self.clock.now)

    @rule(request=IDS)
    def release(self, request: str) -> None:
        self.fleet.release(request)
        self.held.pop(request, None)

    @rule(replica=ALL, accepted=st.lists(IDS, max_size=3), running=st.integers(0, 9), waiting=st.integers(0, 3))
    def report(self, replica: str, accepted: list[str], running: int, waiting: int) -> None:
        self.fleet.report(replica, load(running=running, waiting=waiting), accepted)
        for request in accepted:
            self.held.pop(request, None)
        if replica in self.up:
            assert state(self.fleet, replica).load.running == running

    @rule(seconds=st.floats(0, RESERVATION_SECONDS))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(replica=ALL)
    def suspect(self, replica: str) -> None:
        self.fleet.suspect(replica)

    @rule()
    @precondition(lambda self: self.up)
    def ask(self) -> None:
        rows = self.fleet.candidates(("large", "small"))
        assert {self.fleet.state(row).name for row in rows} <= set(self.up)
        assert len(rows) == len(set(rows.tolist())) > 0
        self.forget_old()

    @invariant()
    def sums_are_right(self) -> None:
        self.fleet.check_integrity()
        assert self.fleet.num_reserved == len(self.held)
        for replica in sorted(self.up):
            mine = [held for held in self.held.values() if held[0] == replica]
            yielding = [held for held in mine if held[2]]
            tokens = [sum(held[1] for held in group) for group in (mine, yielding)]
            assert sent(self.fleet, replica) == [len(mine), len(yielding), *tokens]
        rows = [self.fleet.row(name) for name in self.up]
        assert None not in rows
        assert len(set(rows)) == len(rows)


TestAnyOrder = AnyOrder.TestCase
