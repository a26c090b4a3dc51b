"""The limits within which one replica schedules."""

from __future__ import annotations

import msgspec


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one replica."""

    num_blocks: int
    """Blocks in the cache, the null block included."""
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int = 1024
    pipeline_stages: int = 1
    prefix_caching: bool = True
