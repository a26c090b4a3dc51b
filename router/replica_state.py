"""What an ingress knows of one replica, and what follows from it for the next request."""

from __future__ import annotations

import math

from ..cluster.messages import ModelCard
from ..cluster.price import token_prices
from ..cluster.replica_report import ReplicaLoad, StepCurve

UNKNOWN_CURVE = StepCurve(base=0.02, prefill_token=0.0002, decode_row=0.001)
"""Of a replica that has not measured its own and whose model nobody has measured."""


_SHORTEST = 1e-9
"""Seconds that any work takes."""


class Column:
    """Columns of a replica's row in the fleet: all that the cost function needs, worked out when it changes and not for
    every request. `URGENT_…` is for requests that do not yield, before which yielding work does not count."""

    MODEL = 0
    """Number of the model."""
    QUEUED = 1
    """Tokens that are computed before a new request's own, as reported."""
    URGENT_QUEUED = 2
    STEP = 3
    """Seconds of a step without prompts: base and decoding rows."""
    URGENT_STEP = 4
    OVER = 5
    """Requests that must end before a new one gets a slot; none if not positive."""
    URGENT_OVER = 6
    PLACE_SECONDS = 7
    """Between two ends of requests in a full replica."""
    STEPS_PER_TOKEN = 8
    """One over the token budget of a step."""
    PREFILL_TOKEN = 9
    TPOT = 10
    """Seconds per token once the new request runs, too."""
    PROMPT_PRICE = 11
    OUTPUT_PRICE = 12
    PRESENT = 13
    """Requests that run, wait or are on their way."""
    SENT = 14
    """The same of requests that were sent since."""
    URGENT_SENT = 15
    REPORTED = 16
    """When, in seconds of the fleet's clock."""
    PROMPT_SPEED = 17
    """Tokens per second at which the reported ones are computed, beside the sequences that run."""
    COUNT = 18


class ReplicaState:
    """Load as reported, and requests that were sent since and are not part of it yet."""

    __slots__ = (
        "card",
        "curve",
        "last_routed",
        "load",
        "model",
        "name",
        "reported",
        "sent",
        "sent_tokens",
        "yielding_sent",
        "yielding_sent_tokens",
    )

    def __init__(self, name: str, model: int, card: ModelCard, curve: StepCurve | None) -> None:
        """A replica that has not reported yet is taken as empty, with the limits that it was configured with."""
        self.name = name
        self.model = model
        self.card = card
        self.curve = curve
        """Measured by this replica or another one of its model; None: nobody has."""
        self.load = ReplicaLoad(0, 0, 0, 0, 0, 0, 1, 1, card.max_num_seqs, card.max_num_batched_tokens, curve, 0.0)
        self.reported = 0.0
        """When `load` came, in seconds of the fleet's clock."""
        self.sent = self.yielding_sent = 0
        self.sent_tokens = self.yielding_sent_tokens = 0
        """To be computed of the requests that were sent."""
        self.last_routed = 0
        """Value of a counter of decisions when the last one went here; 0: never."""

    def count(self, sign: int, tokens: int, *, yields: bool) -> None:
        """A request with so many tokens to be computed is on its way (1), or has arrived or will not come (−1)."""
        self.sent += sign
        self.sent_tokens += sign * tokens
        if yields:
            self.yielding_sent += sign
            self.yielding_sent_tokens += sign * tokens

    @property
    def waiting(self) -> int:
        """Requests that wait there or are on their way."""
        return self.load.waiting + self.sent

    @property
    def queued_tokens(self) -> int:
        """To be computed there before a new request's own, as reported and sent since."""
        return self.load.prefill_tokens + self.sent_tokens

    @property
    def full(self) -> bool:
        """No more requests may wait there."""
        return self.waiting >= self.card.max_num_waiting

    def row(self) -> tuple[float, ...]:
        """The columns of `Column`."""
        load, card = self.load, self.card
        curve = self.curve or UNKNOWN_CURVE
        running, waiting = load.running, self.waiting
        urgent_running = running - load.yielding_running
        urgent_waiting = waiting - load.yielding_waiting - self.yielding_sent
        slots = load.max_num_seqs
        if load.free_blocks <= 0:
            slots = min(slots, max(1, running))
        budget = load.max_num_batched_tokens
        step = curve.base + curve.decode_row * min(running, slots)
        tokens = load.prefill_tokens
        seconds = math.ceil(tokens / budget) * step + tokens * curve.prefill_token
        prices = card.estimated_prices
        if card.price_per_hour is not None:
            prices = token_prices(card.price_per_hour, curve, card.max_num_seqs)
        return (
            self.model,
            tokens,
            tokens - load.yielding_prefill_tokens,
            step,
            curve.base + curve.decode_row * min(urgent_running, slots),
            running + waiting + 1 - slots,
            urgent_running + urgent_waiting + 1 - slots,
            load.residence / slots,
            1.0 / budget,
            curve.prefill_token,
            curve.base + curve.decode_row * min(running + waiting + 1, slots),
            prices.prompt,
            prices.output,
            running + waiting,
            self.sent_tokens,
            self.sent_tokens - self.yielding_sent_tokens,
            self.reported,
            tokens / max(seconds, _SHORTEST),
        )
