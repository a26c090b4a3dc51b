"""The cost function: what it would cost to send one request to each of many replicas, of one or several models.

Predicted times follow from each replica's measured step curve (`cluster/replica_report.py`), with

    u  tokens of the prompt that its cache does not hold       q  tokens that are computed before, reported and sent
    r  sequences that run beside them                          w  sequences that wait, with those sent
    B  token budget of a step                                  S  slots

    TTFT = ceil((q + u) / B) · (base + min(r, S) · decode_row) + (q + u) · prefill_token + slot wait
    slot wait = max(0, r + w + 1 − S) · residence / S
    TPOT = base + min(r + w + 1, S) · decode_row

Of the tokens that were reported, those do not count that the replica has probably computed since, evenly over the time
that all of them take: a report is up to 100 ms old, longer than many requests take. S is no more than the sequences
that run (at least 1) where no block is free. Work that yields (class `batch`) does not count before a request that does
not: the scheduler lets it go first. `cluster/queue_time.py` has the same formula for autoscaling; here most of it is
worked out when a replica's state changes (`router/replica_state.py`).

The cost is a sum of terms without unit, each 1 at its limit:

    ttft · TTFT / target  +  tpot · TPOT / target  +  late · (what either exceeds its target by, in targets)
    + delay · n · u · prefill_token / c / TTFT target  what computing the prompt takes from all others
    + price · what it costs more than the cheapest candidate / price of the dearest
    + switch · 1 if another model answered the session before

n is the mean number of requests at a replica. A prompt that is computed anew although it lies in another cache is not
paid for by its own request alone: the replica is busy with it for as long, and everyone who comes until then waits. The
mean over all candidates, and not the replica's own number, because those who are there already do not wait for it. c is
the number of requests under way with the same beginning, per replica that has it: of a copy of a prefix that is in such
demand, others have the use.

The price is that of the whole prompt, so that it weighs one model against another and not the replicas of one: what a
warm cache saves is in the predicted times already, and in n · u · prefill_token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cluster.latency_class import LatencyTargets
from ..cluster.router_config import CostWeights
from .replica_state import Column

Floats = NDArray[np.float64]

_OF_ALL = (Column.QUEUED, Column.SENT, Column.STEP, Column.OVER)
_OF_URGENT = (Column.URGENT_QUEUED, Column.URGENT_SENT, Column.URGENT_STEP, Column.URGENT_OVER)
_OLDEST = 1.0
"""Seconds for which a replica is believed to work on what it reported. Every one reports twice a second."""
_ROUNDING = 1e-6
"""Of a step: a prompt that just fits takes no step more because 1 / B was rounded."""


class Costs(NamedTuple):
    """One value per candidate."""

    ttft: Floats
    """Predicted seconds to the first token."""
    tpot: Floats
    """Predicted seconds per token after it."""
    price: Floats
    """Dollars for the request, whatever is cached of it."""
    cost: Floats
    """The sum of all terms: less is better."""


def predict(columns: Floats, uncached: Floats | float, *, now: float, yields: bool) -> tuple[Floats, Floats]:
    """TTFT and TPOT of a request on each replica, in seconds.

    Args:
        columns: of the fleet, [Column.COUNT, candidates].
        uncached: tokens to be computed for the request, [candidates].
        now: seconds of the fleet's clock.
        yields: the request is of class `batch`.
    """
    queued, sent, step, over = (columns[column] for column in (_OF_ALL if yields else _OF_URGENT))
    tokens = np.maximum(columns[Column.REPORTED] - now, -_OLDEST)
    tokens *= columns[Column.PROMPT_SPEED]
    tokens += queued
    np.maximum(tokens, 0.0, out=tokens)
    tokens += sent
    tokens += uncached
    ttft = tokens * columns[Column.STEPS_PER_TOKEN]
    ttft -= _ROUNDING
    np.ceil(ttft, out=ttft)
    ttft *= step
    tokens *= columns[Column.PREFILL_TOKEN]
    ttft += tokens
    if over.max() > 0:
        ttft += np.maximum(over, 0.0) * columns[Column.PLACE_SECONDS]
    return ttft, columns[Column.TPOT]


def evaluate(
    columns: Floats,
    lengths: Floats,
    uncached: Floats,
    output_tokens: float,
    targets: LatencyTargets,
    weights: CostWeights,
    *,
    now: float,
    session_model: int | None = None,
    copies_wanted: float = 1.0,
) -> Costs:
    """What a request would cost on each replica.

    Args:
        columns: of the fleet, [Column.COUNT, candidates]; at least one candidate.
        lengths: tokens of the prompt, [candidates].
        uncached: of these, to be computed, [candidates].
        output_tokens: that are expected.
        targets: of the request.
        weights: of the terms.
        now: seconds of the fleet's clock.
        session_model: number of the model that answered the session before.
        copies_wanted: requests under way that would use another copy of what is cached of the prompt, per copy.
    """
    ttft, tpot = predict(columns, uncached, now=now, yields=targets.yields)
    price = lengths * columns[Column.PROMPT_PRICE]
    price += output_tokens * columns[Column.OUTPUT_PRICE]

    cost = ttft * (weights.ttft / targets.ttft)
    cost += tpot * (weights.tpot / targets.tpot)
    for seconds, target in ((ttft, targets.ttft), (tpot, targets.tpot)):
        if seconds.max() > target:
            cost += np.maximum(seconds - target, 0.0) * (weights.late / target)
    present = float(columns[Column.PRESENT].sum()) / columns.shape[1]
    if present:
        taken = uncached * columns[Column.PREFILL_TOKEN]
        taken *= weights.delay * present / copies_wanted / targets.ttft
        cost += taken
    dearest = float(price.max())
    if dearest > 0:  # a part that all have in common would only blur the difference of the other terms
        dearer = price - price.min()
        dearer /= dearest  # first: one over the smallest floats is infinite
        dearer *= weights.price
        cost += dearer
    if session_model is not None:
        cost += weights.switch * (columns[Column.MODEL] != session_model)
    return Costs(ttft, tpot, price, cost)
