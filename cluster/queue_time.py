"""How long a request that arrives now would wait at one replica, predicted from what the replica reports of itself.

With the replica's measured step curve, and

    u  tokens of the prompt that its cache does not hold     q  tokens of prompts that are computed before
    r  sequences that run beside it                          w  sequences that wait before it
    B  token budget of a step                                S  sequences that can run at once

    first token = ceil((q + u) / B) · (base + min(r, S) · decode_row) + (q + u) · prefill_token + slot wait
    slot wait   = max(0, r + w + 1 − S) · residence / S

S is `max_num_seqs`. If no block is free, it is what runs now: so many sequences and no more does the cache hold. One of
S slots becomes free every residence / S seconds, and whoever comes after w others waits for w + 1 that are not free.

Work that yields (class `batch`) is left out of q, r and w for a request that does not yield: the scheduler lets such a
request go first, and batch gives up its slots and blocks.

`router/cost.py` has the same formula for many replicas at a time.
"""

from __future__ import annotations

import math

from .latency_class import BATCH, CLASS_NAMES
from .replica_report import ReplicaLoad

MAX_RETRY_SECONDS = 3600


def first_token_seconds(load: ReplicaLoad, *, yields: bool, uncached_tokens: int = 0) -> float | None:
    """Predicted seconds until the first token of a request that arrives now; with 0 tokens of its own, what it waits.

    Without a step curve an idle replica's wait is 0 and everything else is unknown: None.
    """
    beside = load.running if yields else load.running - load.yielding_running
    before = load.waiting if yields else load.waiting - load.yielding_waiting
    queued = load.prefill_tokens if yields else load.prefill_tokens - load.yielding_prefill_tokens
    tokens = queued + uncached_tokens
    if load.curve is None:
        return None if beside or before or tokens else 0.0
    slots = load.max_num_seqs
    if load.free_blocks == 0:
        slots = min(slots, max(1, load.running))
    steps = math.ceil(tokens / load.max_num_batched_tokens)
    of_a_step = load.curve.seconds(0, min(beside, slots))
    slot_wait = max(0, beside + before + 1 - slots) * load.residence / slots
    return steps * of_a_step + tokens * load.curve.prefill_token + slot_wait


def queue_seconds(load: ReplicaLoad) -> dict[str, float]:
    """What a request of each latency class would wait before any work of its own; classes without a prediction are
    left out."""
    waits = {name: first_token_seconds(load, yields=name == BATCH) for name in CLASS_NAMES}
    return {name: seconds for name, seconds in waits.items() if seconds is not None}


def retry_seconds(wait: float) -> int:
    """What a refused request is told for a predicted wait (Retry-After): whole seconds, at least 1."""
    return min(MAX_RETRY_SECONDS, max(1, math.ceil(wait)))
