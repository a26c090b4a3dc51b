"""The plans that the shards have and have not answered yet."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from .sequence import Sequence


class _Plan(NamedTuple):
    step: int
    sampling: list[Sequence]
    """Sequences that get a token by it."""
    prefill_tokens: int
    seconds: float
    """Predicted; 0 while the speed is not known."""
    made: float
    put_off: bool


class PlansInFlight:
    """Oldest first: results come in this order. Times are seconds of the scheduler's clock."""

    def __init__(self) -> None:
        self._plans: deque[_Plan] = deque()
        self._began = 0.0
        """When the shards began with the oldest one."""

    def __len__(self) -> int:
        return len(self._plans)

    def add(
        self,
        step: int,
        sampling: list[Sequence],
        prefill_tokens: int,
        seconds: float,
        now: float,
        *,
        put_off: bool = False,
    ) -> None:
        """A plan with so many tokens of prompts was made, later than it could have been if it was `put_off`. It takes
        `seconds`, as predicted."""
        if not self._plans:
            self._began = now
        self._plans.append(_Plan(step, sampling, prefill_tokens, seconds, now, put_off))

    def pop(self, step: int, now: float) -> list[Sequence]:
        """The result of `step` has come, which must be that of the oldest plan; the sequences that it samples."""
        plan = self._plans.popleft()
        assert plan.step == step, f"result of step {step} came while step {plan.step} was due"
        self._began = now
        return plan.sampling

    @property
    def newest_seconds(self) -> float:
        """What the newest plan takes, as predicted; 0 without one."""
        return self._plans[-1].seconds if self._plans else 0.0

    @property
    def put_off_until(self) -> float | None:
        """When the oldest plan was made, if it was put off until then."""
        return self._plans[0].made if self._plans and self._plans[0].put_off else None

    def remaining(self, now: float) -> float:
        """Predicted seconds until the last result comes."""
        if not self._plans:
            return 0.0
        return sum(plan.seconds for plan in self._plans) - self._elapsed(now)

    def prefill_tokens(self, now: float) -> int:
        """Tokens of prompts that are not computed yet, as if the oldest plan computed its own one after the other."""
        if not self._plans:
            return 0
        oldest = self._plans[0]
        done = self._elapsed(now) / oldest.seconds if oldest.seconds else 0.0
        return sum(plan.prefill_tokens for plan in self._plans) - int(done * oldest.prefill_tokens)

    def _elapsed(self, now: float) -> float:
        """Seconds since the shards began with the oldest plan. One that is overdue may end at any moment."""
        return min(now - self._began, self._plans[0].seconds)
