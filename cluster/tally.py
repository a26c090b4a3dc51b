"""Counts of sequences and of the tokens that they lack, kept up to date instead of counted."""

from __future__ import annotations

from collections.abc import Iterable

from .sequence import Sequence


class Tally:
    """How many sequences a collection has, how many tokens they lack, and the part of both that yields.

    The scheduler asks after every step, when there may be thousands of sequences.
    """

    __slots__ = ("lacking", "sequences", "yielding", "yielding_lacking")

    def __init__(self) -> None:
        self.sequences = 0
        self.lacking = 0
        """Tokens, see `Sequence.lacking`."""
        self.yielding = 0
        """Sequences that yield."""
        self.yielding_lacking = 0

    def add(self, sequence: Sequence) -> None:
        """A sequence has come."""
        self._count(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has gone."""
        self._count(sequence, -1)

    def change(self, sequence: Sequence, lacking: int) -> None:
        """A sequence of the collection lacks so many tokens now."""
        self.lacking += lacking - sequence.lacking
        if sequence.yields:
            self.yielding_lacking += lacking - sequence.lacking
        sequence.lacking = lacking

    def _count(self, sequence: Sequence, sign: int) -> None:
        self.sequences += sign
        self.lacking += sign * sequence.lacking
        if sequence.yields:
            self.yielding += sign
            self.yielding_lacking += sign * sequence.lacking

    def check_integrity(self, members: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the counts are those of `members`."""
        recount = Tally()
        for sequence in members:
            recount.add(sequence)
        for name in self.__slots__:
            kept, counted = getattr(self, name), getattr(recount, name)
            assert kept == counted, f"{name} is kept as {kept} and counted as {counted}"
