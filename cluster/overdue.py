"""When work that yields stops yielding, so that nothing starves."""

from __future__ import annotations

from .sequence import Sequence


class Overdue:
    """Ends the yielding of sequences whose first token was due, a few at a time and the oldest first.

    All at once would turn the order around: behind a backlog of work that waits longer than its target, everything in
    the queue is overdue, and thus more urgent than any request that arrives. A few always make progress, so each has
    its turn.

    Args:
        at_once: sequences that may have stopped yielding and not ended.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._yielding: dict[Sequence, None] = {}  # by arrival, which is by deadline: they have one target
        self._stopped: set[Sequence] = set()

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence that yields."""
        self._yielding[sequence] = None

    def discard(self, sequence: Sequence) -> None:
        """A sequence has ended, whether it was watched or not."""
        self._yielding.pop(sequence, None)
        self._stopped.discard(sequence)

    def take(self, now: float) -> Sequence | None:
        """A sequence that must stop yielding now."""
        oldest = next(iter(self._yielding), None)
        if oldest is None or oldest.deadline > now or len(self._stopped) >= self._at_once:
            return None
        del self._yielding[oldest]
        self._stopped.add(oldest)
        return oldest

    def __len__(self) -> int:
        """Sequences that yield."""
        return len(self._yielding)
