"""What one replica of a model is told, after all that the user left open has been decided."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..cluster.messages import Endpoint


class ReplicaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A `ModelConfig` with its defaults filled in."""

    name: str
    folder: Path
    """On a file system that every node sees."""
    tensor_parallel_size: int
    pipeline_parallel_size: int
    dtype: str
    """"auto", which every shard resolves for its device, "float32", "bfloat16" or "float16"."""
    device: str
    """"cpu" or "cuda"."""
    load_format: str
    """"auto" or "dummy"."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int
    block_size: int
    gpu_memory_utilization: float
    kv_cache_memory: int | None
    kv_cache_dtype: str
    """"auto", "int8" or "fp8"."""
    enable_prefix_caching: bool
    num_threads: int | None
    """CPU threads per shard; None: as many as its share of its node's cores (`cluster/cpu_plan.py`)."""
    shards_per_node: int
    """Shards of all models and replicas that share one node's memory and cores."""
    listener: Endpoint | None = None
    """Where progress and failures are reported to (`actors/reporter.py`)."""
