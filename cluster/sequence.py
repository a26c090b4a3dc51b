"""A request while the engine works on it."""

from __future__ import annotations

import enum

from .request import EngineRequest

Urgency = tuple[bool, float, int]
"""(yields, due, number of arrival): smaller is more urgent, and whatever yields comes after all that does not."""


class Status(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Known tokens, scheduled tokens and blocks of one request.

          prompt_len        len(tokens)   total
              │                  │          │
        ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁░░░░░░░░░░░        ░ sampled in a step in flight, value not known yet
        ══════════════════════════▶                    scheduled: computed, or being computed by plans in flight

    The engine's one rule is that `scheduled` catches up with `total`. Prefill, chunked prefill, a prefix-cache hit
    (`scheduled` starts further right), decode (`total` grows by one) and recompute (`scheduled` falls back to 0) are
    all this rule.
    """

    __slots__ = (
        "arrival",
        "block_hashes",
        "blocks",
        "cached_tokens",
        "deadline",
        "first_token_time",
        "lacking",
        "max_len",
        "pending",
        "prompt_len",
        "registered",
        "request",
        "scheduled",
        "scheduled_time",
        "sent",
        "slot",
        "status",
        "stop_tokens",
        "tokens",
        "urgency",
        "yields",
    )

    def __init__(self, request: EngineRequest, max_model_len: int, arrival: float, urgency: Urgency) -> None:
        self.request = request
        self.tokens = request.prompt + request.generated
        """Prompt and generated tokens, as far as the scheduler knows them."""
        self.prompt_len = len(request.prompt)
        self.max_len = min(self.prompt_len + request.sampling.max_tokens, max_model_len)
        self.stop_tokens = frozenset(request.sampling.stop_token_ids)
        self.status = Status.WAITING
        self.scheduled = 0
        self.pending = 0
        """Tokens that plans in flight will sample."""
        self.sent = 0
        """Tokens that all shards know."""
        self.slot = -1
        self.blocks: list[int] = []
        self.block_hashes: list[bytes] = []
        """Chained hashes of the full blocks of `tokens`, computed once as tokens become known."""
        self.registered = 0
        """Leading blocks that other sequences can find by their hash."""
        self.cached_tokens = -1
        """Tokens found in the prefix cache at the first admission; -1 before it and after it was reported."""
        self.lacking = len(self.tokens)
        """Known tokens that no plan has scheduled: all of them while it waits (as of when it began to), what is left of
        its prompt while it runs, and 0 from there on, when it lacks one token at a time. `cluster/tally.py` counts."""
        self.arrival = arrival
        self.deadline = arrival + request.latency.ttft
        """When its first token is due."""
        self.urgency = urgency
        """Fixed until it stops yielding."""
        self.yields = urgency[0]
        """It gives way to all sequences that do not; see `cluster/overdue.py` for when that ends."""
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None

    @property
    def total(self) -> int:
        """Known tokens and those being sampled."""
        return len(self.tokens) + self.pending

    def stop_yielding(self) -> None:
        """From now on its place is by its due time alone. No collection that is in order of urgency may hold it."""
        self.yields = False
        self.urgency = (False, *self.urgency[1:])
