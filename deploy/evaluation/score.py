"""Exact-match scores of one model's replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from .intervals import wilson
from .items import EvalItem, right


class Score(msgspec.Struct):
    """Right answers among the items of one task or group of tasks."""

    right: int = 0
    items: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.items

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson(self.right, self.items)


def score(items: Sequence[EvalItem], replies: Sequence[str]) -> dict[str, Score]:
    """Scores of every task in order of appearance, then of every difficulty, then of all."""
    tasks: dict[str, Score] = {}
    difficulties: dict[str, Score] = {}
    total = Score()
    for item, is_right in zip(items, right(items, replies), strict=True):
        groups = [tasks.setdefault(item.task, Score()), total]
        if item.difficulty is not None:
            groups.append(difficulties.setdefault(f"all {item.difficulty}", Score()))
        for group in groups:
            group.items += 1
            group.right += is_right
    return {**tasks, **difficulties, "all": total}


def figures(s: Score) -> dict[str, Any]:
    """A score as it stands in a JSON file."""
    low, high = s.interval
    return {"right": s.right, "items": s.items, "accuracy": s.accuracy, "low": low, "high": high}
