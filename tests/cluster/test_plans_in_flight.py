"""What is under way, and how early the next step is planned."""

from __future__ import annotations

import pytest

from raytroupe.cluster.lead_time import DISPATCH_SECONDS, LeadTime
from raytroupe.cluster.plans_in_flight import PlansInFlight


def test_what_remains_is_what_is_left_of_the_oldest_and_all_of_the_others():
    plans = PlansInFlight()
    assert plans.remaining(1.0) == 0.0
    plans.add(0, [], 0, 0.3, now=1.0)
    plans.add(1, [], 0, 0.2, now=1.1)
    assert plans.remaining(1.1) == pytest.approx(0.4)
    assert plans.remaining(5.0) == pytest.approx(0.2), "the oldest one is overdue"
    plans.pop(0, now=5.0)
    assert plans.remaining(5.1) == pytest.approx(0.1), "the other one begins with the result"
    plans.pop(1, now=5.2)
    assert plans.remaining(5.2) == 0.0
    plans.add(2, [], 0, 0.3, now=7.0)
    assert plans.remaining(7.0) == pytest.approx(0.3), "it began when it was made"


def test_prompts_in_flight_are_computed_bit_by_bit():
    plans = PlansInFlight()
    assert plans.prefill_tokens(1.0) == 0
    plans.add(0, [], 300, 0.3, now=1.0)
    plans.add(1, [], 50, 0.1, now=1.0)
    assert plans.prefill_tokens(1.0) == 350
    assert plans.prefill_tokens(1.1) == pytest.approx(250, abs=1)
    assert plans.prefill_tokens(9.0) == 50, "the oldest one is overdue"
    plans.pop(0, now=9.0)
    assert plans.prefill_tokens(9.05) == pytest.approx(25, abs=1)
    plans.add(2, [], 7, 0.0, now=9.05)
    plans.pop(1, now=9.1)
    assert plans.prefill_tokens(9.2) == 7, "how long it takes is not known"


def test_results_come_in_order():
    plans = PlansInFlight()
    plans.add(4, [], 0, 0.1, now=0.0)
    with pytest.raises(AssertionError, match="result of step 5 came while step 4 was due"):
        plans.pop(5, now=0.1)


def test_only_what_was_put_off_says_so():
    plans = PlansInFlight()
    assert plans.put_off_until is None
    plans.add(0, [], 0, 0.1, now=0.0)
    plans.add(1, [], 0, 0.1, now=0.05, put_off=True)
    assert plans.put_off_until is None
    plans.pop(0, now=0.1)
    assert plans.put_off_until == 0.05


def test_the_lead_settles_where_few_plans_are_late():
    lead = LeadTime()
    needed = 0.02
    late = 0
    for number in range(3000):
        spare = lead.seconds - needed * (0.5 + (number * 0.618) % 0.5)  # errors of up to a half
        lead.observe(spare)
        late += number >= 1000 and spare < DISPATCH_SECONDS
    assert 0.05 < late / 2000 < 0.12
    assert needed * 0.8 < lead.seconds < needed * 1.3


def test_the_lead_has_bounds():
    lead = LeadTime()
    for _ in range(1000):
        lead.observe(1.0)
    shortest = lead.seconds
    for _ in range(1000):
        lead.observe(0.0)
    assert shortest == 0.001
    assert lead.seconds == 0.1
