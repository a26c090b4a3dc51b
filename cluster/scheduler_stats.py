"""Counters and times that the scheduler keeps for whoever publishes metrics."""

from __future__ import annotations

import msgspec

from .request import FinishReason
from .sequence import Sequence

_ROUNDING = 1e-9
"""Seconds by which sums of times may miss each other."""


class RequestTimes(msgspec.Struct, frozen=True):
    """One finished request, in seconds since its arrival at the scheduler."""

    finish_reason: FinishReason
    latency_class: str
    prompt_tokens: int
    generated_tokens: int
    queued: float | None
    """Until it was first scheduled; None if it never was."""
    first_token: float | None
    """Until its first token; None if it had none."""
    total: float
    ttft_met: bool
    """The first token came within the class's target."""
    tpot_met: bool
    """So did the others, in the mean; true of a single token."""

    @property
    def within_target(self) -> bool:
        """It counts as goodput."""
        return self.ttft_met and self.tpot_met

    @classmethod
    def of(cls, sequence: Sequence, reason: FinishReason, now: float) -> RequestTimes:
        """The times of a sequence that ends now."""
        begin, scheduled, first = sequence.arrival, sequence.scheduled_time, sequence.first_token_time
        latency = sequence.request.latency
        followers = len(sequence.tokens) - sequence.prompt_len - len(sequence.request.generated) - 1
        return cls(
            reason,
            latency.name,
            prompt_tokens=sequence.prompt_len,
            generated_tokens=len(sequence.tokens) - sequence.prompt_len,
            queued=None if scheduled is None else scheduled - begin,
            first_token=None if first is None else first - begin,
            total=now - begin,
            ttft_met=first is not None and first <= sequence.deadline,
            tpot_met=first is not None and now - first <= latency.tpot * followers + _ROUNDING,
        )


class SchedulerStats(msgspec.Struct):
    """Totals since start. `finished` is drained by its reader."""

    prefix_queries: int = 0
    """Tokens looked up in the prefix cache at first admission."""
    prefix_hits: int = 0
    """Tokens found there."""
    preemptions: int = 0
    refused_late: int = 0
    """Requests that were told that their first token could not come in time."""
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
    refused_late: int
    prompt_tokens: int
    generated_tokens: int
