"""Requests that wait for admission, most urgent first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .sequence import Sequence, Status, Urgency
from .tally import Tally

_FEW = 64
"""Removed sequences that may stay in the heap beside as many as there are members."""


class WaitingQueue:
    """A heap by urgency, from which any member can be removed.

    Removed ones leave the heap when they surface, or when they outnumber the members.
    """

    def __init__(self) -> None:
        self.tally = Tally()
        self._heap: list[tuple[Urgency, Sequence]] = []
        self._members: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._members)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence; one that was preempted takes its old place, because its urgency is the same."""
        sequence.status = Status.WAITING
        sequence.lacking = len(sequence.tokens)
        self.tally.add(sequence)
        self._members.add(sequence)
        heapq.heappush(self._heap, (sequence.urgency, sequence))

    def head(self) -> Sequence | None:
        """The most urgent sequence, or None."""
        while self._heap:
            urgency, sequence = self._heap[0]
            if sequence in self._members and urgency is sequence.urgency:
                return sequence
            heapq.heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take a member out."""
        self._members.remove(sequence)
        self.tally.remove(sequence)
        if self._heap[0][1] is sequence:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * len(self._members) + _FEW:
            self._heap = [(member.urgency, member) for member in self._members]
            heapq.heapify(self._heap)

    def __iter__(self) -> Iterator[Sequence]:
        """Members in no particular order."""
        return iter(self._members)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the members wait, without memory, and the counts are theirs."""
        self.tally.check_integrity(self._members)
        for sequence in self._members:
            name = sequence.request.request_id
            assert sequence.status is Status.WAITING, f"{name} waits with status {sequence.status}"
            assert not sequence.blocks, f"{name} waits with blocks"
            assert sequence.slot < 0, f"{name} waits with a slot"
            assert sequence.lacking <= len(sequence.tokens), f"{name} lacks {sequence.lacking} tokens of fewer"
