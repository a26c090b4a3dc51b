"""Requests that would rather be refused at once than served late."""

from __future__ import annotations

import heapq
import math

from .errors import TargetUnreachable
from .kv_manager import KVManager
from .pace import Pace
from .running_set import RunningSet
from .sequence import Sequence, Status
from .waiting_queue import WaitingQueue

_FEW = 64
"""Sequences that wait no more and may stay in the heap beside as many as wait."""


class LateRequests:
    """Finds waiting requests whose first token cannot come in time any more, without looking at all in every step.

    A heap by the latest moment at which a prompt could still begin. That moment moves with the cache and with the
    measured speed, so it is computed again when it has come. While the speed is not known, it is the deadline.

    Args:
        budget: tokens of a step.
    """

    def __init__(self, running: RunningSet, waiting: WaitingQueue, kv: KVManager, pace: Pace, budget: int) -> None:
        self._running = running
        self._waiting = waiting
        self._kv = kv
        self._pace = pace
        self._budget = budget
        self._heap: list[tuple[float, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def watch(self, sequence: Sequence) -> None:
        """A sequence begins to wait."""
        if _may_be_refused(sequence):
            if len(self._heap) > 2 * len(self._waiting) + _FEW:
                self._heap = [entry for entry in self._heap if entry[2].status is Status.WAITING]
                heapq.heapify(self._heap)
            self._push(sequence, self._latest_start(sequence))

    def take(self, now: float) -> Sequence | None:
        """A waiting sequence that is too late, or None. It is not watched any more."""
        while self._heap and self._heap[0][0] < now:
            sequence = heapq.heappop(self._heap)[2]
            if sequence.status is Status.WAITING and _may_be_refused(sequence):
                latest = self._latest_start(sequence)
                if latest < now:
                    return sequence
                self._push(sequence, latest)
        return None

    def refusal_of(self, sequence: Sequence, now: float) -> TargetUnreachable | None:
        """Why a sequence that arrives is refused: its first token cannot come in time after all more urgent prompts."""
        if not _may_be_refused(sequence) or now + self._queue_seconds(sequence) <= self._latest_start(sequence):
            return None
        return self.refusal(sequence, now)

    def refusal(self, sequence: Sequence, now: float) -> TargetUnreachable:
        """What the client of a sequence that is too late is told."""
        latency, queue_seconds = sequence.request.latency, self._queue_seconds(sequence)
        return TargetUnreachable(
            f"the first token cannot come within {latency.ttft:g} s (latency class {latency.name!r}): the request has "
            f"waited {now - sequence.arrival:.2f} s, and more urgent prompts take about {queue_seconds:.2f} s; "
            "try again later, or allow more time",
            retry_after=max(1, math.ceil(queue_seconds)),
        )

    def _queue_seconds(self, sequence: Sequence) -> float:
        """For computing the prompts that are more urgent; 0 while the speed is not known."""
        everyone = (*self._running.sequences, *self._waiting)
        lacking = sum(other.lacking for other in everyone if other.urgency < sequence.urgency)
        rows = self._running.tally.sequences - self._running.tally.yielding
        return self._pace.queue_seconds(lacking, self._budget, rows)

    def _latest_start(self, sequence: Sequence) -> float:
        uncached = len(sequence.tokens) - len(self._kv.cached_prefix(sequence)) * self._kv.block_size
        return sequence.deadline - self._pace.prompt_seconds(uncached, self._budget)

    def _push(self, sequence: Sequence, latest: float) -> None:
        heapq.heappush(self._heap, (latest, sequence.urgency[2], sequence))


def _may_be_refused(sequence: Sequence) -> bool:
    """It wants to know, and has produced no token, here or elsewhere."""
    wants_to_know = sequence.request.latency.refuse_late
    return wants_to_know and len(sequence.tokens) == sequence.prompt_len and not sequence.pending
