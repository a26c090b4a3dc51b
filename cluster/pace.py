"""How fast a replica works and what is asked of it, and how much work that yields a step may therefore take."""

from __future__ import annotations

import math

from .replica_report import StepCurve
from .step_timer import StepTimer

PATIENCE = 0.9
"""Work that yields and is in flight may delay a request that arrives by this share of what its prompt takes: it waits
for half of that in the mean. In simulated time (tests/cluster/test_interactive_beside_batch.py) the 99th percentile of
the time to the first token grows by a quarter: prompts that wait for each other make it twice the mean already."""
EFFICIENT = 1.5
"""Such a delay may always be so many steps without prompts: smaller chunks would spend the time on reading the
weights."""
UNNOTICED = 0.005
"""Seconds that such a delay may always be: what HTTP takes is more."""
UNSEEN_PATIENCE = 0.1
"""Seconds of such a delay while no other requests have come for a while."""
SEEN_SECONDS = 60.0
"""A request that does not yield is a reason to expect another one for so long."""
BLIND_SHARE = 0.25
"""Of the token budget, for prompts that yield, while the speed is not known yet."""
_WEIGHT = 1 / 16
"""Of the newest member in moving averages."""


class Pace:
    """Measured speed, and moving averages over requests."""

    def __init__(self) -> None:
        self.curve: StepCurve | None = None
        """How long a step takes; None until some have been measured."""
        self.residence = 0.0
        """Seconds from first scheduling to the end of finished requests; 0: none has finished."""
        self._timer = StepTimer()
        self.uncached_share = 1.0
        """Of a prompt's tokens, those that were not found in the cache, as of late."""
        self._prompt = 0.0  # uncached tokens of requests that do not yield
        self._seen = -math.inf

    # --- what happens ---------------------------------------------------------------------------------------------

    def step_ended(self, seconds: float, prefill_tokens: int, decode_rows: int) -> None:
        """A step of so many tokens of prompts and sequences that decode took `seconds`."""
        self._timer.observe(seconds, prefill_tokens, decode_rows)
        self.curve = self._timer.curve

    def started(self, tokens: int, cached: int, yields: bool, now: float) -> None:
        """A request was scheduled for the first time, with so many of its tokens found in the cache."""
        self.uncached_share += _WEIGHT * ((tokens - cached) / tokens - self.uncached_share)
        if not yields:
            self._prompt = _average(self._prompt, tokens - cached)
            self._seen = now

    def finished(self, seconds: float) -> None:
        """A request has ended, so long after it was scheduled for the first time."""
        self.residence = _average(self.residence, seconds)

    # --- what follows ---------------------------------------------------------------------------------------------

    def prompt_seconds(self, tokens: float, budget: int, rows: int = 0) -> float:
        """For computing so many tokens of prompts, in steps of `budget` tokens beside `rows` sequences that decode; 0
        while the speed is not known."""
        if self.curve is None:
            return 0.0
        return math.ceil(tokens / budget) * self.curve.seconds(0, rows) + self.curve.prefill_token * tokens

    def queue_seconds(self, lacking: int, budget: int, rows: int) -> float:
        """The same for tokens of which nobody has looked yet how many are cached: as many as of late."""
        return self.prompt_seconds(lacking * self.uncached_share, budget, rows)

    def step_seconds(self, prefill_tokens: int, rows: int) -> float:
        """Of one step; 0 while the speed is not known."""
        return self.curve.seconds(prefill_tokens, rows) if self.curve is not None else 0.0

    def patience(self, rows: int, now: float) -> float:
        """Seconds of work that may be in flight if work that yields is part of it, while `rows` sequences run.

        A request that arrives waits for the plans in flight before its own first step.
        """
        if self.curve is None:
            return math.inf
        delay = UNSEEN_PATIENCE
        if now - self._seen < SEEN_SECONDS:
            delay = min(delay, PATIENCE * self.curve.seconds(self._prompt, 0))
        return max(delay, EFFICIENT * self.curve.seconds(0, rows), UNNOTICED)

    def chunk_within(self, seconds: float, rows: int, budget: int) -> int:
        """Tokens of prompts in a step that takes `seconds` with `rows` sequences that decode; may be negative."""
        if self.curve is None or not self.curve.prefill_token:
            return int(budget * BLIND_SHARE)
        return int(min((seconds - self.curve.seconds(0, rows)) / self.curve.prefill_token, budget))


def _average(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old) if old else float(new)
