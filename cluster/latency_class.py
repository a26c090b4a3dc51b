"""What a request may take: the latency classes and their targets, from the HTTP header down to the engine's queue.

Urgency is a deadline: arrival plus the target for the first token. Work of class `batch` fills what the other classes
leave, and is the first to yield.
"""

from __future__ import annotations

import msgspec

INTERACTIVE, DEFAULT, BATCH, EXPLICIT = "interactive", "default", "batch", "explicit"
CLASS_NAMES = (INTERACTIVE, DEFAULT, BATCH)
"""What a client may ask for by name. `explicit` is the class of requests that bring targets of their own."""


class LatencyTargets(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one request may take, in seconds. Part of `EngineRequest`."""

    name: str = DEFAULT
    """One of `CLASS_NAMES`, or `explicit`: the label of metrics."""
    ttft: float = 5.0
    """From arrival to the first token."""
    tpot: float = 0.2
    """Mean time between tokens after the first one."""
    refuse_late: bool = False
    """Refuse the request (429) as soon as its first token cannot come in time any more, instead of serving it late."""

    @property
    def yields(self) -> bool:
        """True if the work fills gaps: it gives way to all other work."""
        return self.name == BATCH


DEFAULT_TARGETS = {
    INTERACTIVE: LatencyTargets(name=INTERACTIVE, ttft=1.0, tpot=0.1),
    DEFAULT: LatencyTargets(),
    BATCH: LatencyTargets(name=BATCH, ttft=600.0, tpot=60.0),
}
