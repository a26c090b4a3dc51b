"""Single rules of the scheduler, each in the smallest history that shows it."""

from __future__ import annotations

import pytest
from scheduler_steps import Clock, make_scheduler, request, result_of, step

from raytroupe.cluster.errors import InvalidRequest, QueueFull
from raytroupe.cluster.request import EngineRequest, FinishReason, SamplingParams
from raytroupe.cluster.scheduler import PRIORITY_SECONDS
from raytroupe.cluster.step import StepPlan


def test_long_prompts_are_computed_in_chunks_beside_running_decodes():
    scheduler = make_scheduler()
    scheduler.add(request("short", 3))
    step(scheduler)
    scheduler.add(request("long", 50, first=1))
    plan, outputs = step(scheduler)
    assert plan.counts == [1, 31]
    assert plan.decode_rows == 1
    assert set(outputs) == {"short"}
    plan, outputs = step(scheduler)
    assert plan.counts == [1, 19]
    assert set(outputs) == {"short", "long"}


def test_a_sequence_feeds_its_own_token_while_the_result_is_still_on_its_way():
    scheduler = make_scheduler()
    scheduler.add(request("a", 3))
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert (second.starts, second.counts, second.samples) == ([3], [1], [True])
    assert second.new_tokens == []
    scheduler.update(result_of(first))
    scheduler.update(result_of(second))
    scheduler.check_integrity()


def test_pipeline_stages_get_different_sequences_and_the_sampled_tokens_back():
    scheduler = make_scheduler(pipeline_stages=2)
    for index in range(4):
        scheduler.add(request(f"r{index}", 3, first=index))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert len(first.slots) == len(second.slots) == 2
    assert not set(first.slots) & set(second.slots)
    assert scheduler.schedule() is None
    scheduler.update(result_of(first, token=9))
    third = scheduler.schedule()
    assert third.new_tokens == [(slot, 3, [9]) for slot in first.slots]


@pytest.mark.parametrize(("slots", "blocks"), [(8, 101), (64, 25)])
def test_all_pipeline_stages_stay_busy_behind_a_backlog(slots, blocks):
    scheduler = make_scheduler(
        pipeline_stages=2, max_num_seqs=slots, num_blocks=blocks, max_num_batched_tokens=512, prefix_caching=False
    )
    for index in range(100):
        scheduler.add(request(f"r{index}", 8, max_tokens=20, first=index))
    in_flight: list[StepPlan] = []
    fewest = []
    for _ in range(60):
        while scheduler.num_in_flight < 2 and (plan := scheduler.schedule()):
            in_flight.append(plan)
        fewest.append(scheduler.num_in_flight)
        scheduler.update(result_of(in_flight.pop(0)))
    assert min(fewest[5:]) == 2


def test_a_stop_token_in_flight_discards_what_was_computed_beyond_it():
    scheduler = make_scheduler()
    scheduler.add(request("a", 3, sampling={"stop_token_ids": (7,)}))
    first, second = scheduler.schedule(), scheduler.schedule()
    (output,) = scheduler.update(result_of(first, token=7))
    assert (output.finish_reason, output.stop_token) == (FinishReason.STOP, 7)
    assert scheduler.update(result_of(second)) == []
    assert scheduler.snapshot().blocks_held == 0


def test_the_last_allowed_token_is_not_followed_by_another_plan():
    scheduler = make_scheduler()
    scheduler.add(request("a", 3, max_tokens=1))
    first = scheduler.schedule()
    assert scheduler.schedule() is None
    (output,) = scheduler.update(result_of(first))
    assert output.finish_reason is FinishReason.LENGTH


def test_equal_prompts_share_blocks_but_the_last_token_is_always_computed():
    scheduler = make_scheduler()
    scheduler.add(request("a", 16, max_tokens=1))
    step(scheduler)
    scheduler.add(request("b", 16, max_tokens=1))
    plan, outputs = step(scheduler)
    assert (plan.starts, plan.counts) == ([12], [4])
    assert outputs["b"].cached_tokens == 12
    assert (scheduler.stats.prefix_queries, scheduler.stats.prefix_hits) == (32, 12)


def test_equal_prompts_in_one_step_share_blocks():
    scheduler = make_scheduler()
    scheduler.add(request("a", 9))
    scheduler.add(request("b", 9))
    plan, _ = step(scheduler)
    tables = dict(plan.new_blocks)
    (a, b) = (tables[new.slot] for new in plan.new)
    assert a[:2] == b[:2]
    assert a[2] != b[2]
    assert sorted(plan.counts) == [1, 9]


def test_another_cache_salt_shares_nothing():
    scheduler = make_scheduler()
    scheduler.add(request("a", 16, max_tokens=1, cache_salt="x"))
    step(scheduler)
    scheduler.add(request("b", 16, max_tokens=1, cache_salt="y"))
    _, outputs = step(scheduler)
    assert outputs["b"].cached_tokens == 0


def test_a_full_pool_preempts_the_least_urgent_and_recomputes_it_with_its_tokens():
    scheduler = make_scheduler(num_blocks=9, max_model_len=32, prefix_caching=False)
    scheduler.add(request("urgent", 12, max_tokens=20))
    scheduler.add(request("other", 12, max_tokens=20, first=1))
    preempted = False
    plan = None
    for _ in range(30):
        if scheduler.stats.preemptions and not preempted:
            preempted = True
            assert scheduler.num_running == 1
        plan, outputs = step(scheduler)
        if "urgent" in outputs and outputs["urgent"].finish_reason:
            break
    assert preempted
    plan, _ = step(scheduler)
    assert len(plan.new[0].tokens) > 12
    assert plan.new[0].prompt_len == 12


def test_a_preempted_sequence_waits_for_its_token_in_flight():
    scheduler = make_scheduler(pipeline_stages=3, max_num_seqs=2)
    scheduler.add(request("background", 4, priority=5))
    first = scheduler.schedule()
    scheduler.add(request("urgent", 4, first=1, max_tokens=1))
    scheduler.add(request("urgent too", 4, first=2, max_tokens=1))
    second = scheduler.schedule()
    third = scheduler.schedule()
    assert scheduler.stats.preemptions == 1
    assert {new.tokens[0] for plan in (second, third) for new in plan.new} == {1, 2}
    (output,) = scheduler.update(result_of(first))
    assert output.request_id == "background"
    scheduler.update(result_of(second))
    scheduler.update(result_of(third))
    plan, _ = step(scheduler)
    assert plan.new[0].tokens[-1] == 7


def test_a_better_priority_takes_the_place_of_a_running_request():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(request("background", 4, priority=5))
    step(scheduler)
    scheduler.add(request("urgent", 4, priority=0, first=1))
    _, outputs = step(scheduler)
    assert set(outputs) == {"urgent"}
    assert scheduler.stats.preemptions == 1


def test_nobody_is_preempted_for_a_request_that_would_not_fit_even_then():
    scheduler = make_scheduler(num_blocks=18)
    for name in ("a", "b"):  # they share their first 9 blocks, which "keeper" holds as well
        scheduler.add(request(name, 38, priority=5))
    scheduler.add(request("keeper", 38, priority=0))
    for _ in range(4):
        step(scheduler)
    assert scheduler.num_running == 3
    scheduler.add(request("urgent", 40, priority=1, first=1))
    step(scheduler)
    assert scheduler.stats.preemptions == 0


def test_aborted_requests_do_not_pile_up_behind_a_waiting_one():
    scheduler = make_scheduler(num_blocks=18, prefix_caching=False)
    scheduler.add(request("running", 60, max_tokens=4))
    step(scheduler)
    scheduler.add(request("head", 60, first=1))
    for index in range(1000):
        scheduler.add(request(f"r{index}", 4, first=2))
        scheduler.abort(f"r{index}")
    assert len(scheduler._waiting._heap) < 100
    assert scheduler.num_waiting == 1


def test_waiting_makes_up_for_priority():
    clock = Clock()
    scheduler = make_scheduler(clock, max_num_seqs=1)
    scheduler.add(request("running", 4, max_tokens=1))
    scheduler.add(request("patient", 4, priority=1, max_tokens=1, first=1))
    clock.now = PRIORITY_SECONDS + 1
    scheduler.add(request("late", 4, priority=0, max_tokens=1, first=2))
    order = [name for _ in range(3) for name in step(scheduler)[1]]
    assert order == ["running", "patient", "late"]


def test_a_large_request_at_the_head_is_not_overtaken():
    scheduler = make_scheduler(num_blocks=18, max_num_batched_tokens=64, prefix_caching=False)
    scheduler.add(request("first", 40, max_tokens=4))
    step(scheduler)
    scheduler.add(request("large", 40, first=1))
    scheduler.add(request("small", 4, first=2))
    plan, _ = step(scheduler)
    assert plan.new == []


def test_abort_frees_blocks_at_once_and_ignores_the_late_result():
    scheduler = make_scheduler()
    scheduler.add(request("a", 20))
    plan = scheduler.schedule()
    assert scheduler.abort("a")
    assert scheduler.snapshot().blocks_held == 0
    assert not scheduler.abort("a")
    assert scheduler.update(result_of(plan)) == []
    scheduler.check_integrity()


def test_known_output_counts_as_output():
    scheduler = make_scheduler()
    scheduler.add(request("a", 4, max_tokens=3, generated=[5, 6]))
    plan, outputs = step(scheduler)
    assert plan.new[0].prompt_len == 4
    assert plan.new[0].tokens[4:] == [5, 6]
    assert outputs["a"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (EngineRequest(request_id="x", prompt=[], sampling=SamplingParams()), "no tokens"),
        (request("x", 64), "64 tokens"),
        (request("x", 4, first=-1), "token id -1"),
        (request("x", 4, first=2**31), "token id 2147483648"),
        (request("x", 4, max_tokens=2, generated=[1, 2]), "max_tokens is 2"),
    ],
)
def test_impossible_requests_are_refused(bad, message):
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequest, match=message):
        scheduler.add(bad)
    assert not scheduler.has_work


def test_a_full_queue_refuses_with_a_time_to_retry():
    scheduler = make_scheduler(max_num_waiting=2)
    scheduler.add(request("a", 4))
    scheduler.add(request("b", 4))
    with pytest.raises(QueueFull, match="max_num_waiting = 2") as caught:
        scheduler.add(request("c", 4))
    assert caught.value.retry_after >= 1
    with pytest.raises(InvalidRequest, match="in use"):
        scheduler.add(request("a", 4))


def test_a_request_whose_client_reads_already_is_let_into_a_full_queue():
    scheduler = make_scheduler(max_num_waiting=1)
    scheduler.add(request("a", 4))
    scheduler.add(request("b", 4, generated=[5]))
    assert scheduler.num_waiting == 2


def test_outputs_say_where_their_tokens_belong():
    scheduler = make_scheduler()
    scheduler.add(request("new", 4, max_tokens=3))
    scheduler.add(request("resumed", 4, max_tokens=4, generated=[5, 6], first=1))
    indices = [{name: output.index for name, output in step(scheduler)[1].items()} for _ in range(3)]
    assert indices == [{"new": 0, "resumed": 2}, {"new": 1, "resumed": 3}, {"new": 2}]


def test_a_resumed_request_is_counted_once_and_its_output_is_no_cached_prompt():
    scheduler = make_scheduler()
    scheduler.add(request("a", 8, max_tokens=9))
    while scheduler.has_work:
        step(scheduler)
    counted = scheduler.snapshot()
    assert (counted.prompt_tokens, counted.prefix_queries) == (8, 8)
    scheduler.add(request("a again", 8, max_tokens=20, generated=[7] * 9))
    output = step(scheduler)[1]["a again"]
    assert output.cached_tokens == 8, "16 of its tokens were cached, but its prompt has 8"
    resumed = scheduler.snapshot()
    assert (resumed.prompt_tokens, resumed.prefix_queries, resumed.prefix_hits) == (8, 8, 0)


def test_nothing_is_looked_up_in_a_cache_that_is_off():
    scheduler = make_scheduler(prefix_caching=False)
    scheduler.add(request("a", 8))
    step(scheduler)
    assert scheduler.snapshot().prefix_queries == 0


def test_internal_waste_counts_the_unfilled_slots_of_the_last_block():
    scheduler = make_scheduler()
    scheduler.add(request("a", 5))
    step(scheduler)
    assert scheduler.snapshot().internal_waste == pytest.approx(1 - 6 / 8)
