"""What a latency class does in the queue and in a step, each rule in the smallest history that shows it."""

from __future__ import annotations

import msgspec
import pytest
from scheduler_steps import Clock, make_scheduler, request, result_of, step

from raytroupe.cluster.errors import QueueFull, TargetUnreachable
from raytroupe.cluster.latency_class import BATCH, DEFAULT, DEFAULT_TARGETS, EXPLICIT, INTERACTIVE, LatencyTargets
from raytroupe.cluster.overdue import Overdue
from raytroupe.cluster.pace import PATIENCE
from raytroupe.cluster.replica_report import StepCurve
from raytroupe.cluster.request import EngineRequest, SamplingParams
from raytroupe.cluster.scheduler import Scheduler
from raytroupe.cluster.scheduler_config import SchedulerConfig
from raytroupe.cluster.step import StepResult
from raytroupe.cluster.yielding import RIDE_SHARE

CURVE = StepCurve(base=0.01, prefill_token=0.001, decode_row=0.001)
IMPATIENT = LatencyTargets(name=EXPLICIT, ttft=0.1, refuse_late=True)
_first = iter(range(200, 10_000))


def add(scheduler: Scheduler, name: str, length: int = 4, latency: str | LatencyTargets = DEFAULT, **fields) -> None:
    """Queue a request that shares its prefix with no other one."""
    targets = DEFAULT_TARGETS[latency] if isinstance(latency, str) else latency
    scheduler.add(request(name, length, first=next(_first), latency=targets, **fields))


def names_of(scheduler: Scheduler, plan) -> set[str]:
    slots = {sequence.slot: sequence.request.request_id for sequence in scheduler._running.sequences}
    return {slots[slot] for slot in plan.slots}


# --- order --------------------------------------------------------------------------------------------------------


def test_whose_first_token_is_due_first_goes_first():
    clock = Clock()
    scheduler = make_scheduler(clock, max_num_seqs=1)
    add(scheduler, "batch", latency=BATCH, max_tokens=1)
    add(scheduler, "default", max_tokens=1)
    clock.now = 3.0
    add(scheduler, "interactive", latency=INTERACTIVE, max_tokens=1)
    clock.now = 4.5
    add(scheduler, "too late", latency=INTERACTIVE, max_tokens=1)
    order = [name for _ in range(4) for name in step(scheduler)[1]]
    assert order == ["interactive", "default", "too late", "batch"]


def test_a_more_urgent_prompt_goes_before_the_rest_of_a_long_one():
    scheduler = make_scheduler()
    add(scheduler, "long", 60)
    step(scheduler)
    add(scheduler, "urgent", 20, INTERACTIVE)
    plan, outputs = step(scheduler)
    assert set(outputs) == {"urgent"}
    assert sorted(plan.counts) == [12, 20]


# --- yielding -----------------------------------------------------------------------------------------------------


def test_work_that_yields_gives_up_its_slot():
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, "batch", latency=BATCH)
    step(scheduler)
    add(scheduler, "default")
    step(scheduler)
    add(scheduler, "another")
    _, outputs = step(scheduler)
    assert "another" in outputs
    assert scheduler.load().yielding_waiting == 1
    add(scheduler, "a third")
    step(scheduler)
    assert scheduler.stats.preemptions == 1, "default does not yield to default"


def test_work_that_yields_gives_up_its_blocks_first_whenever_it_came():
    scheduler = make_scheduler(num_blocks=18, prefix_caching=False)
    add(scheduler, "batch", 20, BATCH, max_tokens=40, priority=-30)
    step(scheduler)
    add(scheduler, "default", 20, max_tokens=40)
    for _ in range(39):
        step(scheduler)
    assert scheduler.stats.preemptions == 1
    assert [sequence.request.request_id for sequence in scheduler._waiting] == ["batch"]


def test_work_that_yields_has_no_part_in_steps_that_compute_prompts_of_others():
    scheduler = make_scheduler()
    add(scheduler, "batch", latency=BATCH, max_tokens=40)
    add(scheduler, "decoding")
    step(scheduler)
    step(scheduler)
    add(scheduler, "long", 50)
    add(scheduler, "more batch", latency=BATCH)
    for _ in range(2):
        plan = scheduler.schedule()
        assert names_of(scheduler, plan) == {"decoding", "long"}
        scheduler.update(result_of(plan))
    plan = scheduler.schedule()
    assert names_of(scheduler, plan) == {"decoding", "long", "batch", "more batch"}


@pytest.mark.parametrize(("decode_row", "riders"), [(0.001, 2), (0.01, 0), (0.0, 5)])
def test_those_that_yield_ride_along_where_it_takes_hardly_longer(decode_row, riders):
    scheduler = make_scheduler(max_num_batched_tokens=64)
    for number in range(5):
        add(scheduler, f"batch {number}", latency=BATCH, max_tokens=40)
        step(scheduler)
    scheduler.pace.curve = StepCurve(base=0.01, prefill_token=0.001, decode_row=decode_row)
    add(scheduler, "arrival", 30)
    plan, _ = step(scheduler)
    assert plan.counts == [1] * riders + [30], f"{RIDE_SHARE} of 0.01 + 30 × 0.001 s"
    assert scheduler.stats.preemptions == 0


def test_nobody_rides_along_who_may_have_to_give_way():
    scheduler = make_scheduler(max_num_seqs=3)
    for number in range(3):
        add(scheduler, f"batch {number}", latency=BATCH, max_tokens=40)
        step(scheduler)
    scheduler.pace.curve = StepCurve(base=0.01, prefill_token=0.001, decode_row=0.0)
    add(scheduler, "one", 20)
    add(scheduler, "two", 20)
    plan, _ = step(scheduler)
    assert names_of(scheduler, plan) == {"one", "two"}
    assert scheduler.stats.preemptions == 2
    plan, _ = step(scheduler)
    assert len(plan.counts) == 3


def test_prompts_that_yield_are_cut_to_the_token_time_of_those_that_decode():
    scheduler = make_scheduler(max_num_batched_tokens=64)
    scheduler.pace.curve = CURVE
    add(scheduler, "decoding", 40, LatencyTargets(tpot=0.06))
    step(scheduler)
    add(scheduler, "batch", 60, BATCH)
    plan, _ = step(scheduler)
    assert plan.counts == [1, 19], "0.01 + 0.001 + 19 × 0.001 = half of 0.06"


def test_prompts_that_yield_trickle_where_the_token_time_is_out_of_reach():
    scheduler = make_scheduler()
    scheduler.pace.curve = CURVE
    add(scheduler, "decoding", latency=LatencyTargets(name=EXPLICIT, tpot=1e-6))
    step(scheduler)
    add(scheduler, "batch", 40, BATCH)
    assert step(scheduler)[0].counts == [1, scheduler.config.block_size]


def test_prompts_that_yield_take_a_part_of_the_budget_before_the_speed_is_known():
    scheduler = make_scheduler()
    add(scheduler, "batch", 60, BATCH)
    assert step(scheduler)[0].counts == [8]


def test_alone_work_that_yields_is_in_flight_for_no_longer_than_an_arrival_may_wait():
    clock = Clock()
    scheduler = make_scheduler(clock, max_num_batched_tokens=1000, max_model_len=1000, num_blocks=1001)
    scheduler.pace.curve = CURVE
    add(scheduler, "batch", 900, BATCH)
    first = scheduler.schedule()
    assert first.counts == [90], "0.01 + 90 × 0.001 = 0.1 s"
    assert scheduler.schedule() is None, "an arrival would wait for another step"
    add(scheduler, "arrival", 30)
    second = scheduler.schedule()
    assert second.counts == [30], "it does not wait for the result"
    scheduler.update(result_of(first))
    scheduler.update(result_of(second))
    clock.now = 1.0
    scheduler.abort("arrival")
    seconds = PATIENCE * CURVE.seconds(30, 0)
    assert scheduler.schedule().counts == [round((seconds - CURVE.seconds(0, 1)) / 0.001)], "others are expected"


def test_a_step_that_yields_is_planned_shortly_before_its_turn():
    clock = Clock()
    scheduler = make_scheduler(clock)
    scheduler.pace.curve = CURVE
    add(scheduler, "batch", latency=BATCH)
    step(scheduler)
    decoding = scheduler.schedule()
    ends = CURVE.seconds(0, 1)
    assert scheduler.schedule() is None
    assert 0.8 * ends < scheduler.plan_at < ends
    clock.now = scheduler.plan_at
    following = scheduler.schedule()
    assert following.decode_rows == 1
    assert scheduler.plan_at is None
    clock.now = ends
    scheduler.update(result_of(decoding))
    assert scheduler.schedule() is None
    assert ends + 0.8 * ends < scheduler.plan_at < 2 * ends, "the next step began with the result"
    scheduler.update(result_of(following))


def test_an_arrival_takes_the_step_that_was_not_planned_yet():
    clock = Clock()
    scheduler = make_scheduler(clock)
    scheduler.pace.curve = CURVE
    add(scheduler, "batch", latency=BATCH)
    step(scheduler)
    scheduler.schedule()
    assert scheduler.schedule() is None
    add(scheduler, "arrival", 20)
    plan = scheduler.schedule()
    assert plan.counts[plan.decode_rows :] == [20]
    assert scheduler.plan_at is None


def test_a_step_that_was_planned_too_late_makes_the_next_ones_come_sooner():
    clock = Clock()
    scheduler = make_scheduler(clock, max_model_len=400, num_blocks=201)
    scheduler.pace.curve = CURVE
    add(scheduler, "batch", max_tokens=300, latency=BATCH)
    step(scheduler)

    def lead() -> float:
        plan = scheduler.schedule()
        assert scheduler.schedule() is None
        ahead = clock.now + CURVE.seconds(0, 1) - scheduler.plan_at
        clock.now += CURVE.seconds(0, 1) / 2
        scheduler.update(result_of(plan))  # sooner than predicted
        return ahead

    assert lead() < lead() < lead()


def test_a_lead_that_grew_beyond_a_step_shrinks_again():
    clock = Clock()
    scheduler = make_scheduler(clock, max_model_len=400, num_blocks=201)
    scheduler.pace.curve = CURVE
    scheduler._lead.seconds = 0.1
    add(scheduler, "batch", max_tokens=300, latency=BATCH)
    step(scheduler)
    scheduler.schedule()
    for _ in range(250):
        assert scheduler.schedule() is None
        clock.now = scheduler.plan_at
        following = scheduler.schedule()
        clock.now += min(scheduler._lead.seconds, CURVE.seconds(0, 1) / 2)
        scheduler.update(StepResult(following.step - 1, [7], None, 0.0, 0.0))
    assert scheduler._lead.seconds < CURVE.seconds(0, 1) / 2


def test_nothing_else_is_put_off():
    scheduler = make_scheduler()
    scheduler.pace.curve = CURVE
    add(scheduler, "default")
    assert scheduler.schedule() is not None
    assert scheduler.schedule() is not None
    add(scheduler, "batch", latency=BATCH, max_tokens=1)
    assert scheduler.plan_at is None


# --- starvation ---------------------------------------------------------------------------------------------------


def test_work_that_yields_comes_to_its_end_beside_others_without_end():
    clock = Clock()
    scheduler = make_scheduler(clock, max_num_seqs=1)
    add(scheduler, "batch", latency=BATCH)
    served: set[str] = set()
    for index in range(200):
        add(scheduler, f"r{index}", latency=INTERACTIVE, max_tokens=1)
        clock.now += 5.0
        served |= set(step(scheduler)[1])
        if index == 110:
            assert "batch" not in served
    assert "batch" in served


def test_a_burst_takes_the_slots_of_work_that_yields_in_one_step():
    scheduler = make_scheduler()
    for index in range(8):
        add(scheduler, f"batch-{index}", latency=BATCH, max_tokens=40)
    while scheduler.num_running < 8:
        step(scheduler)
    for index in range(6):
        add(scheduler, f"r{index}")
    assert set(step(scheduler)[1]) == {f"r{index}" for index in range(6)}
    assert scheduler.stats.preemptions == 6


def test_a_backlog_that_is_overdue_does_not_turn_the_order_around():
    clock = Clock()
    scheduler = make_scheduler(clock, max_num_seqs=8)
    for index in range(20):
        add(scheduler, f"batch-{index}", latency=BATCH, max_tokens=40)
    step(scheduler)
    clock.now = 1000.0
    for index in range(7):
        add(scheduler, f"r{index}")
    _, outputs = step(scheduler)
    assert {f"r{index}" for index in range(7)} <= set(outputs)
    assert scheduler.load().yielding_running == 0
    assert scheduler._running.sequences[0].request.request_id == "batch-0"


def test_only_so_many_stop_yielding_at_once():
    scheduler = make_scheduler()
    for index in range(3):
        add(scheduler, f"batch-{index}", latency=BATCH)
    overdue, (first, second, third) = Overdue(at_once=1), scheduler._by_id.values()
    for sequence in (first, second, third):
        overdue.add(sequence)
    assert overdue.take(599.0) is None
    assert overdue.take(601.0) is first
    assert overdue.take(601.0) is None
    overdue.discard(second)
    overdue.discard(first)
    assert overdue.take(601.0) is third


# --- refusal ------------------------------------------------------------------------------------------------------


def blocked_scheduler(clock: Clock) -> Scheduler:
    """Its only slot is taken for long."""
    scheduler = make_scheduler(clock, max_num_seqs=1)
    add(scheduler, "running", 4, INTERACTIVE, max_tokens=50)
    step(scheduler)
    return scheduler


def test_a_request_is_refused_when_its_deadline_has_passed():
    clock = Clock()
    scheduler = blocked_scheduler(clock)
    add(scheduler, "patient", 20, LatencyTargets(name=EXPLICIT, ttft=0.1))
    add(scheduler, "a", 20, IMPATIENT)
    clock.now = 0.09
    assert scheduler.refuse_late() == []
    clock.now = 0.11
    ((name, error),) = scheduler.refuse_late()
    assert name == "a"
    assert "within 0.1 s (latency class 'explicit')" in error.message
    assert "waited 0.11 s" in error.message
    assert (error.status, error.retry_after) == (429, 1)
    assert scheduler.refuse_late() == []
    assert (scheduler.num_waiting, scheduler.stats.refused_late) == (1, 1)
    scheduler.check_integrity()


def test_a_request_is_refused_when_its_prompt_takes_too_long_to_be_in_time():
    clock = Clock()
    scheduler = blocked_scheduler(clock)
    scheduler.pace.curve = CURVE
    add(scheduler, "a", 20, IMPATIENT)
    clock.now = 0.069
    assert scheduler.refuse_late() == []
    clock.now = 0.071
    assert [name for name, _ in scheduler.refuse_late()] == ["a"], "0.01 + 20 × 0.001 s from then on is too late"


def test_what_is_cached_needs_no_time():
    clock = Clock()
    scheduler = make_scheduler(clock, max_num_seqs=1)
    scheduler.pace.curve = CURVE
    scheduler.add(request("before", 20, max_tokens=1))
    step(scheduler)
    add(scheduler, "running", latency=INTERACTIVE, max_tokens=50)
    step(scheduler)
    scheduler.add(request("a", 20, latency=IMPATIENT))
    clock.now = 0.071
    assert scheduler.refuse_late() == []
    clock.now = 0.087
    assert [name for name, _ in scheduler.refuse_late()] == ["a"]


def test_a_request_is_refused_on_arrival_behind_a_queue_that_is_too_long():
    scheduler = make_scheduler()
    scheduler.pace.curve = CURVE
    for index in range(40):
        add(scheduler, f"r{index}", 60, INTERACTIVE)
    with pytest.raises(TargetUnreachable, match=r"more urgent prompts take about 3\.15 s") as caught:
        add(scheduler, "a", 4, LatencyTargets(name=EXPLICIT, ttft=2.0, refuse_late=True))
    assert caught.value.retry_after == 4
    assert "a" not in scheduler._by_id
    add(scheduler, "b", 4, IMPATIENT)  # more urgent than all of them
    assert scheduler.stats.refused_late == 1
    scheduler.check_integrity()


def test_a_request_that_has_answered_is_never_refused():
    clock = Clock()
    scheduler = make_scheduler(clock, max_num_seqs=1)
    add(scheduler, "begun", 4, msgspec.structs.replace(IMPATIENT, name=BATCH))
    step(scheduler)
    add(scheduler, "other", max_tokens=50)
    step(scheduler)
    assert scheduler.stats.preemptions == 1
    add(scheduler, "resumed", 4, IMPATIENT, generated=[5, 6])
    clock.now = 10.0
    assert scheduler.refuse_late() == []


def test_a_request_that_was_preempted_before_its_first_token_can_be_refused():
    clock = Clock()
    scheduler = make_scheduler(clock, max_num_seqs=1)
    add(scheduler, "a", 60, msgspec.structs.replace(IMPATIENT, name=BATCH))
    step(scheduler)
    add(scheduler, "other", max_tokens=50)
    step(scheduler)
    clock.now = 0.2
    assert [name for name, _ in scheduler.refuse_late()] == ["a"]


# --- what is reported ---------------------------------------------------------------------------------------------


def test_load_counts_what_runs_and_waits_and_what_of_it_yields():
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, "decoding", 4)
    step(scheduler)
    add(scheduler, "long", 60)
    step(scheduler)
    add(scheduler, "waiting", 10)
    add(scheduler, "batch", 7, BATCH)
    load = scheduler.load()
    assert (load.running, load.yielding_running, load.waiting, load.yielding_waiting) == (2, 0, 2, 1)
    assert (load.prefill_tokens, load.yielding_prefill_tokens) == (60 - 31 + 10 + 7, 7)
    assert scheduler.schedule() is not None
    assert (scheduler.load().prefill_tokens, scheduler.load().yielding_prefill_tokens) == (60 - 31 + 10 + 7, 7), (
        "what is in flight is not computed yet"
    )
    assert (load.free_blocks, load.total_blocks) == (100 - 2 - 15, 100)
    assert (load.max_num_seqs, load.max_num_batched_tokens, load.curve) == (2, 32, None)


def test_residence_is_the_mean_time_that_requests_run():
    clock = Clock()
    scheduler = make_scheduler(clock)
    assert scheduler.load().residence == 0
    for index in range(100):
        add(scheduler, f"r{index}", max_tokens=1)
        plan = scheduler.schedule()
        clock.now += 3.0
        scheduler.update(result_of(plan))
    add(scheduler, "aborted")
    clock.now += 100.0
    scheduler.abort("aborted")
    assert scheduler.load().residence == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("first", "later", "met"), [(0.9, 0.1, (True, True)), (1.1, 0.1, (False, True)), (0.9, 0.11, (True, False))]
)
def test_finished_requests_say_whether_they_met_their_targets(first, later, met):
    clock = Clock()
    scheduler = make_scheduler(clock)
    add(scheduler, "a", latency=INTERACTIVE, max_tokens=5)
    for index in range(5):
        plan = scheduler.schedule()
        clock.now += later if index else first
        scheduler.update(result_of(plan))
    (times,) = scheduler.stats.drain_finished()
    assert (times.latency_class, times.ttft_met, times.tpot_met) == (INTERACTIVE, *met)
    assert times.within_target is all(met)


def test_a_full_queue_says_when_to_come_again() -> None:
    config = SchedulerConfig(
        num_blocks=200, block_size=4, max_model_len=400, max_num_seqs=2, max_num_batched_tokens=50, max_num_waiting=3
    )
    scheduler = Scheduler(config)
    for _ in range(40):
        scheduler.pace.step_ended(1.0 + 0.02 * 50, 50, 0)
    for number in range(3):
        scheduler.add(EngineRequest(request_id=f"r{number}", prompt=[1] * 100, sampling=SamplingParams()))
    with pytest.raises(QueueFull) as refused:
        scheduler.add(EngineRequest(request_id="late", prompt=[1] * 100, sampling=SamplingParams()))
    # 300 tokens ahead: six steps of two seconds.
    assert 10 <= refused.value.retry_after <= 14
