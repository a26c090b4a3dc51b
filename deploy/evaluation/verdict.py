"""From counts to a verdict.

A variant passes a task if it lost no more than the limit and the statistical margin, and if the sample is large enough
for that to mean something: the upper bound of the loss is at most the limit and the largest margin that is allowed. It
fails if it certainly lost more than the limit. What is neither is undecided, which is not a pass: more samples are
needed. The larger the sample, the closer all bounds come to the loss itself, so that there is a verdict in the end.

    pass        low ≤ limit  and  high ≤ limit + max_margin         (95 % interval of this task)
    fail        low > limit                                         (bound that all criteria share)

Several criteria are judged at once. Failing one is failing all, so that the risks to fail wrongly add up: the bounds
of that side share 2.5 % (Bonferroni). Passing takes all of them, so that the risk to pass wrongly is that of one: the
bounds of that side have 2.5 % each (intersection-union test, Berger, Technometrics 24, 1982, 295–300).

If all tasks together certainly lost more than the limit, one of them did, even if no sample is large enough to tell
which; that is a fail too.

What the base hardly can, a variant cannot lose. A task says something only if the base certainly answers a larger share
right than may be lost: the lower bound of its accuracy (Wilson, 95 %) is above limit + max_margin. Others are beyond
the base and decide nothing; but if they are most tasks, something is wrong with the questions, and nothing is decided.

The perplexity of the text has no margin besides: its interval is narrow, and more text is easily had. It passes if the
interval's upper bound is within the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ...cluster.evaluation_report import Limits, TaskFigures, TextFigures, Verdict
from .intervals import Z_95, paired_difference, quantile, ratio_of_sums, wilson
from .text_losses import TextLosses

TAIL = 0.025
"""Risk of either wrong verdict."""
MIN_SEQUENCES = 30
"""Fewer have no mean that is nearly normal."""
_GROWTH, _MANY = 1.1, 100_000_000
"""How the search for a sufficient number of samples goes on, and where it ends."""


def certain_z(criteria: int) -> float:
    """The quantile of the bounds that make a variant fail, when there are so many criteria."""
    return quantile(TAIL / criteria)


def judge_task(base: Sequence[bool], variant: Sequence[bool], limits: Limits, criteria: int) -> TaskFigures:
    """Compare right answers of both models to the same questions of one task."""
    items = len(base)
    lost = sum(b and not v for b, v in zip(base, variant, strict=True))
    gained = sum(v and not b for b, v in zip(base, variant, strict=True))
    certain = certain_z(criteria)

    def decide(scale: float) -> Verdict:
        counts = lost * scale, gained * scale, items * scale
        if 100 * paired_difference(*counts, certain)[0] > limits.max_loss:
            return Verdict.FAIL
        low, high = paired_difference(*counts)
        passed = 100 * low <= limits.max_loss and 100 * high <= limits.max_loss + limits.max_margin
        return Verdict.PASS if passed else Verdict.UNDECIDED

    low, high = paired_difference(lost, gained, items)
    verdict = decide(1)
    telling = _base_floor(sum(base), items) > limits.max_loss + limits.max_margin
    if verdict is not Verdict.FAIL and not telling:
        verdict = Verdict.BEYOND
    return TaskFigures(
        items=items,
        base_right=sum(base),
        right=sum(variant),
        lost=lost,
        gained=gained,
        base_accuracy=sum(base) / items,
        accuracy=sum(variant) / items,
        loss=100 * (lost - gained) / items,
        low=100 * low,
        high=100 * high,
        certain_loss=100 * paired_difference(lost, gained, items, certain)[0],
        verdict=verdict,
        items_needed=_more(items, decide) if verdict is Verdict.UNDECIDED else 0,
    )


def judge_text(losses: TextLosses, limits: Limits, criteria: int) -> TextFigures:
    """Compare the losses of both models on the same text; the sequences are the independent samples."""
    tokens = losses.tokens
    increases = [variant - base for base, variant in zip(losses.base, losses.variant, strict=True)]
    limit = math.log1p(limits.max_perplexity_increase / 100)
    count, total = len(tokens), sum(tokens)
    mean = sum(increases) / total
    low, high = _interval(increases, tokens, Z_95)
    certain_low, _ = _interval(increases, tokens, certain_z(criteria))
    kl_low, kl_high = _interval(losses.kl_divergence, tokens, Z_95)

    def decide(scale: float) -> Verdict:
        shrink = 1 / math.sqrt(scale)
        if count * scale < MIN_SEQUENCES:
            return Verdict.UNDECIDED
        if mean + (certain_low - mean) * shrink > limit:
            return Verdict.FAIL
        return Verdict.PASS if mean + (high - mean) * shrink <= limit else Verdict.UNDECIDED

    verdict = decide(1)
    return TextFigures(
        sequences=count,
        tokens=total,
        base_perplexity=math.exp(sum(losses.base) / total),
        perplexity=math.exp(sum(losses.variant) / total),
        ratio=math.exp(mean),
        low=math.exp(low),
        high=math.exp(high),
        certain_ratio=math.exp(certain_low),
        kl_divergence=sum(losses.kl_divergence) / total,
        kl_low=max(kl_low, 0.0),
        kl_high=kl_high,
        top1_agreement=sum(losses.agreeing) / total,
        verdict=verdict,
        sequences_needed=_more(count, decide) if verdict is Verdict.UNDECIDED else 0,
    )


def overall(
    tasks: Mapping[str, TaskFigures], total: TaskFigures, text: TextFigures, limits: Limits
) -> tuple[Verdict, list[str]]:
    """The verdict on all criteria together, and why it is not a pass."""
    failed, undecided = [], []
    for name, task in tasks.items():
        if task.verdict is Verdict.FAIL:
            failed.append(
                f"task {name} lost {task.loss:.1f} points ({task.base_accuracy:.1%} → {task.accuracy:.1%}), certainly "
                f"more than {task.certain_loss:.1f}; allowed is {limits.max_loss:g}"
            )
        elif task.verdict is Verdict.UNDECIDED:
            undecided.append(
                f"{task.items_needed} more items of task {name} needed: it lost {task.loss:.1f} points, and with 95 % "
                f"confidence {task.low:.1f} to {task.high:.1f}; allowed are {limits.max_loss:g} and a margin of "
                f"{limits.max_margin:g} at most"
            )
    beyond = [name for name, task in tasks.items() if task.verdict is Verdict.BEYOND]
    if 2 * len(beyond) > len(tasks):
        undecided.append(
            f"{len(beyond)} of {len(tasks)} tasks tell nothing ({', '.join(beyond)}): the base itself answers at most "
            f"{limits.max_loss + limits.max_margin:g} % of their questions for certain; give questions that it can "
            "answer, or a larger --max-tokens"
        )
    if total.verdict is Verdict.FAIL and not failed:
        failed.append(
            f"all tasks together lost {total.loss:.1f} points, certainly more than {total.certain_loss:.1f}, so at "
            f"least one lost more than the {limits.max_loss:g} that is allowed"
        )
    if text.verdict is Verdict.FAIL:
        failed.append(
            f"perplexity rose by {text.ratio - 1:.1%} ({text.base_perplexity:.4g} → {text.perplexity:.4g}), certainly "
            f"more than {text.certain_ratio - 1:.1%}; allowed is {limits.max_perplexity_increase:g} %"
        )
    elif text.verdict is Verdict.UNDECIDED:
        undecided.append(
            f"{text.sequences_needed} more sequences of text needed: perplexity changed by between {text.low - 1:+.1%} "
            f"and {text.high - 1:+.1%}, and more than {limits.max_perplexity_increase:g} % must be ruled out"
        )
    if failed:
        return Verdict.FAIL, failed + undecided
    return (Verdict.UNDECIDED if undecided else Verdict.PASS), undecided


def _base_floor(right: int, items: int) -> float:
    """Per cent of a task's questions that the base answers at least."""
    return 100 * wilson(right, items)[0]


def _interval(values: Sequence[float], tokens: Sequence[int], z: float) -> tuple[float, float]:
    """Of the mean per token; a single sequence says nothing about it."""
    return ratio_of_sums(values, tokens, z) if len(tokens) > 1 else (-math.inf, math.inf)


def _more(count: int, decide: Callable[[float], Verdict]) -> int:
    """Samples to add until `decide` comes to a verdict, if they go like those that there are; `decide` takes the
    factor by which there are more. Where the loss is all but equal to the limit, so many that nobody has them."""
    few, many = count, count + 1
    while decide(many / count) is Verdict.UNDECIDED and many < _MANY:
        few, many = many, math.ceil(_GROWTH * many)
    while many - few > 1:
        middle = (few + many) // 2
        if decide(middle / count) is Verdict.UNDECIDED:
            few = middle
        else:
            many = middle
    return many - count
