"""Constructed counts lead to the verdict that the rule in `deploy/evaluation/verdict.py` promises."""

from __future__ import annotations

import pytest

from raytroupe.cluster.evaluation_report import Limits, TaskFigures, Verdict
from raytroupe.deploy.evaluation.text_losses import TextLosses
from raytroupe.deploy.evaluation.verdict import MIN_SEQUENCES, judge_task, judge_text, overall

LIMITS = Limits()


def task(lost: int, gained: int, items: int, criteria: int = 17, limits: Limits = LIMITS) -> TaskFigures:
    base = [True] * lost + [False] * gained + [True] * (items - lost - gained)
    variant = [False] * lost + [True] * gained + [True] * (items - lost - gained)
    return judge_task(base, variant, limits, criteria)


def text(increase: float, spread: float, count: int = 100) -> TextLosses:
    """Sequences of 10 tokens whose loss per token rises by `increase` on average, and by more or less by `spread`."""
    changes = [increase + spread * (-1) ** index for index in range(count)]
    zeros = [0.0] * count
    return TextLosses([10] * count, [20.0] * count, [20 + 10 * change for change in changes], zeros, [10] * count)


@pytest.mark.parametrize(
    ("lost", "gained", "items", "verdict"),
    [
        (0, 0, 400, Verdict.PASS),
        (0, 0, 61, Verdict.PASS),
        (0, 0, 60, Verdict.UNDECIDED),
        (5, 4, 400, Verdict.PASS),
        (7, 0, 400, Verdict.PASS),  # lost 1.75 points: no more than 1 and the margin
        (9, 0, 400, Verdict.UNDECIDED),  # lost more, but among 17 criteria that may be chance
        (16, 0, 400, Verdict.FAIL),
        (40, 0, 400, Verdict.FAIL),
        (10, 0, 10, Verdict.FAIL),  # few, and nothing is left to doubt
        (2, 0, 40, Verdict.UNDECIDED),
        (40, 30, 400, Verdict.UNDECIDED),  # many answers changed
        (0, 40, 400, Verdict.PASS),  # better
    ],
)
def test_task(lost: int, gained: int, items: int, verdict: Verdict) -> None:
    assert task(lost, gained, items).verdict is verdict


def test_figures_of_a_task() -> None:
    figures = task(12, 2, 400)
    assert (figures.lost, figures.gained, figures.base_right, figures.right) == (12, 2, 398, 388)
    assert figures.loss == pytest.approx(2.5)
    assert figures.certain_loss < figures.low < figures.loss < figures.high
    assert figures.items_needed == 0


@pytest.mark.parametrize(
    ("base_right", "limits", "verdict"),
    [
        (0, LIMITS, Verdict.BEYOND),
        (24, LIMITS, Verdict.BEYOND),  # 6 %: a variant that answers none has lost no more than may be lost
        (33, LIMITS, Verdict.BEYOND),  # 8.3 %, but with 95 % confidence only 5.9 % at least
        (36, LIMITS, Verdict.PASS),
        (36, Limits(max_margin=8), Verdict.BEYOND),
    ],
)
def test_a_task_that_the_base_hardly_can_decides_nothing(base_right: int, limits: Limits, verdict: Verdict) -> None:
    answers = [True] * base_right + [False] * (400 - base_right)
    figures = judge_task(answers, answers, limits, criteria=17)
    assert figures.verdict is verdict
    assert figures.items_needed == 0
    if verdict is Verdict.BEYOND:
        passed, total = judge_text(text(0, 0), limits, 17), task(0, 0, 400)
        of_others, reasons = overall({"sums": figures, "words": task(0, 0, 400)}, total, passed, limits)
        assert (of_others, reasons) == (Verdict.PASS, [])
        alone, reasons = overall({"sums": figures}, total, passed, limits)
        assert alone is Verdict.UNDECIDED
        assert reasons[0].startswith("1 of 1 tasks tell nothing (sums): the base itself answers at most")


def test_what_is_certainly_lost_fails_however_little_the_base_can() -> None:
    base = [True] * 24 + [False] * 376
    assert judge_task(base, [False] * 400, LIMITS, criteria=17).verdict is Verdict.FAIL


def test_items_needed_are_just_enough() -> None:
    needed = task(0, 0, 20).items_needed
    assert task(0, 0, 20 + needed).verdict is Verdict.PASS
    assert task(0, 0, 20 + needed - 1).verdict is Verdict.UNDECIDED


@pytest.mark.parametrize(("lost", "gained", "verdict"), [(400, 400, Verdict.PASS), (460, 360, Verdict.FAIL)])
def test_items_needed_suffice_if_they_go_like_those_before(lost: int, gained: int, verdict: Verdict) -> None:
    limits = Limits(max_margin=0.25)
    needed = task(lost, gained, 4000, limits=limits).items_needed
    assert needed > 0
    items = round(1.01 * (4000 + needed))  # a little more, as counts are whole
    more = task(round(items * lost / 4000), round(items * gained / 4000), items, limits=limits)
    assert more.verdict is verdict
    assert more.items_needed == 0


def test_more_criteria_make_it_harder_to_fail_and_no_easier_to_pass() -> None:
    assert task(9, 0, 400, criteria=1).verdict is Verdict.FAIL
    assert task(9, 0, 400, criteria=17).verdict is Verdict.UNDECIDED
    assert task(7, 0, 400, criteria=1).verdict is task(7, 0, 400, criteria=17).verdict is Verdict.PASS


def test_limits_are_those_that_were_given() -> None:
    assert task(40, 0, 400, limits=Limits(max_loss=10)).verdict is Verdict.PASS
    assert task(0, 0, 400, limits=Limits(max_loss=0, max_margin=0.5)).verdict is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("increase", "spread", "count", "verdict"),
    [
        (0.0, 0.0, 100, Verdict.PASS),
        (0.02, 0.02, 100, Verdict.PASS),
        (0.05, 0.02, 100, Verdict.FAIL),
        (0.028, 0.1, 100, Verdict.UNDECIDED),
        (0.0, 0.0, MIN_SEQUENCES - 1, Verdict.UNDECIDED),
        (-0.5, 0.1, 100, Verdict.PASS),
    ],
)
def test_text(increase: float, spread: float, count: int, verdict: Verdict) -> None:
    figures = judge_text(text(increase, spread, count), LIMITS, criteria=17)
    assert figures.verdict is verdict
    assert (figures.sequences_needed > 0) == (verdict is Verdict.UNDECIDED)


def test_too_few_sequences_need_the_rest() -> None:
    assert judge_text(text(0, 0, 10), LIMITS, 1).sequences_needed == MIN_SEQUENCES - 10


def test_overall_names_what_failed_first_and_what_is_missing() -> None:
    tasks = {"sums": task(40, 0, 400), "lists": task(0, 0, 20), "words": task(0, 0, 400)}
    verdict, reasons = overall(tasks, task(40, 0, 820), judge_text(text(0.1, 0.02), LIMITS, 4), LIMITS)
    assert verdict is Verdict.FAIL
    assert reasons[0].startswith("task sums lost 10.0 points (100.0% → 90.0%), certainly more than ")
    assert reasons[1].startswith("perplexity rose by 10.5%")
    assert reasons[2].startswith("41 more items of task lists needed")
    assert len(reasons) == 3


def test_overall_is_undecided_if_anything_is_and_nothing_failed() -> None:
    passed = judge_text(text(0, 0), LIMITS, 2)
    assert overall({"lists": task(0, 0, 20)}, task(0, 0, 20), passed, LIMITS)[0] is Verdict.UNDECIDED
    assert overall({"words": task(0, 0, 400)}, task(0, 0, 400), passed, LIMITS) == (Verdict.PASS, [])


def test_what_all_tasks_lost_together_fails_though_none_does_alone() -> None:
    tasks = {str(index): task(5, 0, 150, 18) for index in range(16)}
    assert {of_task.verdict for of_task in tasks.values()} == {Verdict.UNDECIDED}
    verdict, reasons = overall(tasks, task(80, 0, 2400, 18), judge_text(text(0, 0), LIMITS, 18), LIMITS)
    assert verdict is Verdict.FAIL
    assert reasons[0].startswith("all tasks together lost 3.3 points, certainly more than 2.")
