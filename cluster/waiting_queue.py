"""Requests that wait for admission, most urgent first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .sequence import Sequence, Status

_FEW = 64
"""Removed sequences that may stay in the heap beside as many as there are members."""


class WaitingQueue:
    """A heap by urgency, from which any member can be removed.

    Removed ones leave the heap when they surface, or when they outnumber the members.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, int], Sequence]] = []
        self._members: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._members)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence; one that was preempted takes its old place, because its urgency never changes."""
        sequence.status = Status.WAITING
        self._members.add(sequence)
        heapq.heappush(self._heap, (sequence.urgency, sequence))

    def head(self) -> Sequence | None:
        """The most urgent sequence, or None."""
        while self._heap:
            sequence = self._heap[0][1]
            if sequence in self._members:
                return sequence
            heapq.heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take a member out."""
        self._members.remove(sequence)
        if self._heap[0][1] is sequence:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * len(self._members) + _FEW:
            self._heap = [(member.urgency, member) for member in self._members]
            heapq.heapify(self._heap)

    def __iter__(self) -> Iterator[Sequence]:
        """Members in no particular order."""
        return iter(self._members)
