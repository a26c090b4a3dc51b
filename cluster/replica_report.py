"""What a replica tells every ingress about itself: its load, its speed, and which blocks its cache has gained and lost.

Reports are numbered. An ingress that misses one asks for a snapshot, so a lost message costs some wrong guesses at
where a prefix is warm and never more: the index is an estimate, the scheduler's own cache decides.
"""

from __future__ import annotations

import msgspec


class StepCurve(msgspec.Struct, frozen=True, array_like=True):
    """How long a step takes, measured by the replica: `base + prefill_token × p + decode_row × d` seconds for a step of
    p tokens of prompts and d sequences that decode."""

    base: float
    prefill_token: float
    decode_row: float

    def seconds(self, prefill_tokens: float, decode_rows: float) -> float:
        """Of one step."""
        return self.base + self.prefill_token * prefill_tokens + self.decode_row * decode_rows


class ReplicaLoad(msgspec.Struct, frozen=True, array_like=True):
    """The work of one replica at one moment. `yielding_…` is the part of it that gives way to all other: class `batch`,
    but for a few sequences whose turn has come."""

    running: int
    """Sequences that hold blocks."""
    yielding_running: int
    waiting: int
    """Sequences that wait for blocks or a slot."""
    yielding_waiting: int
    prefill_tokens: int
    """Known tokens that are not computed yet: of running sequences all, of waiting ones as many as are likely not to be
    found in the cache."""
    yielding_prefill_tokens: int
    free_blocks: int
    """Blocks that can be allocated now, cached ones included."""
    total_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    curve: StepCurve | None
    """None until some steps have been measured."""
    residence: float
    """Mean seconds that finished sequences have run (moving average); 0: none has finished yet."""


class ReplicaReport(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One message from a replica to an ingress.

    Hashes are short ones (`cluster/block_hash.py`), 8 bytes each, little-endian, one after the other.
    """

    model: str
    replica: str
    """Serve's unique id of the replica."""
    number: int
    """One more than that of the report before it, from the subscription's snapshot on."""
    load: ReplicaLoad
    snapshot: bool = False
    """`stored` is everything that the cache holds; forget what was known of this replica."""
    stored: bytes = b""
    evicted: bytes = b""
    accepted: list[str] = []
    """Ids of the requests that have arrived since the last report; from now on they are part of `load`."""
