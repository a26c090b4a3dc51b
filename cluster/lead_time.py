"""How long before its turn a step is planned, where it should be as late as possible."""

from __future__ import annotations

DISPATCH_SECONDS = 0.001
"""A plan takes about so long to reach the shards: one that was made later than that before its turn was late."""
_SHORTEST, _LONGEST = 0.001, 0.1
_MORE, _LESS = 1.25, 0.98
"""By these it changes after a late plan and after one in time: in balance, one plan of twelve is late."""


class LeadTime:
    """Learns from the plans that were late: predictions of how long a step takes have errors, and where other
    processes need the cores, so do the moments at which this one runs."""

    def __init__(self) -> None:
        self.seconds = 0.002

    def observe(self, before_turn: float) -> None:
        """A plan that was put off was made so many seconds before its turn; 0 or less: the shards wait for it."""
        factor = _MORE if before_turn < DISPATCH_SECONDS else _LESS
        self.seconds = min(_LONGEST, max(_SHORTEST, factor * self.seconds))
