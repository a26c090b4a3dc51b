"""Learns from the steps of a replica how long a step takes."""

from __future__ import annotations

from .replica_report import StepCurve

FORGETTING = 0.99
"""Weight of a step relative to the one after it: some hundred steps count."""
SOLVE_EVERY = 8
"""Steps between two estimates, and before the first one."""
SURPRISE = 2.0
"""A step counts as at most so many times shorter than expected."""
_RIDGE = 1e-3
_FORGOTTEN = 1e-200
"""Less is not computed with, lest it lose its digits."""

Vector = list[float]


class StepTimer:
    """Fits `StepCurve` to measured steps by least squares with exponential forgetting.

    The *relative* error is minimised: a decode step of 5 ms says as much as a chunk of 200 ms, and a step that took
    far too long, since a kernel was compiled in it or the process did not run, has next to no weight. Only steps that
    seem far too short could mislead it (two results that are read at once), so their weight is bounded.

    What the steps do not tell, the estimate keeps: a small pull towards the last one decides where they leave
    several solutions, as when only one kind of step comes for a while. Before both kinds have come, a token of a
    prompt and a sequence that decodes count as equal: both are one row of the same matrices.
    """

    def __init__(self) -> None:
        self.curve: StepCurve | None = None
        """The estimate; None until `SOLVE_EVERY` steps have been seen."""
        self._steps = 0
        self._seen_prefill = self._seen_decode = False
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3

    def observe(self, seconds: float, prefill_tokens: int, decode_rows: int) -> None:
        """A step of so many tokens of prompts and sequences that decode took `seconds`."""
        expected = self.curve.seconds(prefill_tokens, decode_rows) if self.curve else 0.0
        seconds = max(seconds, expected / SURPRISE, 1e-6)
        # The equation "curve(step) / seconds = 1".
        row = (1.0 / seconds, prefill_tokens / seconds, decode_rows / seconds)
        for i in range(3):
            products = self._products[i]
            for j in range(3):
                products[j] = FORGETTING * products[j] + row[i] * row[j]
            self._targets[i] = FORGETTING * self._targets[i] + row[i]
        self._steps += 1
        self._seen_prefill |= prefill_tokens > 0
        self._seen_decode |= decode_rows > 0
        if self._steps % SOLVE_EVERY == 0:
            self.curve = self._estimate()

    def _estimate(self) -> StepCurve:
        before = self.curve
        previous = [before.base, before.prefill_token, before.decode_row] if before else [0.0] * 3
        # Columns of equal length, so that the pull is equally strong on each.
        scale = [self._products[i][i] ** 0.5 or 1.0 for i in range(3)]
        matrix = [[self._products[i][j] / (scale[i] * scale[j]) for j in range(3)] for i in range(3)]
        target = [self._targets[i] / scale[i] + _RIDGE * previous[i] * scale[i] for i in range(3)]
        for i in range(3):
            matrix[i][i] += _RIDGE
        free = [i for i in range(3) if self._products[i][i] > _FORGOTTEN]
        solution = [0.0 if i in free else previous[i] for i in range(3)]
        while free:  # whoever is negative is 0, the most negative first
            values = _solve([[matrix[i][j] for j in free] for i in free], [target[i] for i in free])
            lowest = min(range(len(free)), key=values.__getitem__)
            if values[lowest] >= 0.0:
                for i, value in zip(free, values, strict=True):
                    solution[i] = value / scale[i]
                break
            del free[lowest]
        base, prefill_token, decode_row = solution
        if not self._seen_prefill:
            prefill_token = decode_row
        if not self._seen_decode:
            decode_row = prefill_token
        return StepCurve(base, prefill_token, decode_row)


def _solve(matrix: list[Vector], target: Vector) -> Vector:
    """The solution of a small positive definite system, by Gauss-Jordan elimination."""
    size = len(target)
    rows = [[*row, value] for row, value in zip(matrix, target, strict=True)]
    for i in range(size):
        pivot = rows[i][i]
        rows[i] = [value / pivot for value in rows[i]]
        for j in range(size):
            if j != i:
                factor = rows[j][i]
                rows[j] = [value - factor * other for value, other in zip(rows[j], rows[i], strict=True)]
    return [row[size] for row in rows]
