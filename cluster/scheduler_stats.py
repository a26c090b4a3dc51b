"""Counters and times that the scheduler keeps for whoever publishes metrics."""

from __future__ import annotations

import msgspec

from .request import FinishReason
from .sequence import Sequence


class RequestTimes(msgspec.Struct, frozen=True):
    """One finished request, in seconds since its arrival at the scheduler."""

    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    queued: float | None
    """Until it was first scheduled; None if it never was."""
    first_token: float | None
    """Until its first token; None if it had none."""
    total: float

    @classmethod
    def of(cls, sequence: Sequence, reason: FinishReason, now: float) -> RequestTimes:
        """The times of a sequence that ends now."""
        begin, scheduled, first = sequence.arrival, sequence.scheduled_time, sequence.first_token_time
        return cls(
            reason,
            prompt_tokens=sequence.prompt_len,
            generated_tokens=len(sequence.tokens) - sequence.prompt_len,
            queued=None if scheduled is None else scheduled - begin,
            first_token=None if first is None else first - begin,
            total=now - begin,
        )


class SchedulerStats(msgspec.Struct):
    """Totals since start. `finished` is drained by its reader."""

    prefix_queries: int = 0
    """Tokens looked up in the prefix cache at first admission."""
    prefix_hits: int = 0
    """Tokens found there."""
    preemptions: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of requests that were admitted."""
    generated_tokens: int = 0
    finished: list[RequestTimes] = []

    def drain_finished(self) -> list[RequestTimes]:
        """Requests that finished since the last call."""
        finished, self.finished = self.finished, []
        return finished


class SchedulerSnapshot(msgspec.Struct, frozen=True):
    """The state of a scheduler at one moment, for health checks, tests and people."""

    running: int
    waiting: int
    in_flight: int
    blocks_held: int
    blocks_total: int
    internal_waste: float
    """Share of the slots in held blocks that hold no known token, 0 to 1."""
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
