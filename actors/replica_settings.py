"""What one replica of a model is told, after all that the user left open has been decided."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from ..cluster import kv_memory, topology
from ..cluster.kv_memory import DeviceMemory, KVMemory
from ..cluster.messages import Endpoint
from ..cluster.model_spec import ModelSpec
from ..cluster.scheduler_config import SchedulerConfig
from ..cluster.topology import ShardLayout
from .shard_config import ShardConfig

if TYPE_CHECKING:
    from ..cluster.config import ModelConfig  # pydantic, which a shard's process does without


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
    """"cpu" or "cuda"; the local engine leaves "auto" to its shard."""
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

    @classmethod
    def of(cls, model: ModelConfig, *, folder: Path, device: str, max_model_len: int, shards_per_node: int = 1) -> Self:
        """A model as configured, with what was decided."""
        return cls(
            name=model.name,
            folder=folder,
            tensor_parallel_size=model.tensor_parallel_size,
            pipeline_parallel_size=model.pipeline_parallel_size,
            dtype=model.dtype,
            device=device,
            load_format=model.load_format,
            max_model_len=max_model_len,
            max_num_seqs=model.max_num_seqs,
            max_num_batched_tokens=model.max_num_batched_tokens,
            max_num_waiting=model.max_num_waiting,
            block_size=model.block_size,
            gpu_memory_utilization=model.gpu_memory_utilization,
            kv_cache_memory=model.kv_cache_memory,
            kv_cache_dtype=model.kv_cache_dtype,
            enable_prefix_caching=model.enable_prefix_caching,
            num_threads=model.num_threads,
            shards_per_node=shards_per_node,
        )

    def shard_config(
        self, layout: ShardLayout, num_threads: int | None, *, init_method: str = "", listen_fd: int | None = None
    ) -> ShardConfig:
        """What one of the shards is told; the arguments as `ShardConfig` has them."""
        return ShardConfig(
            folder=self.folder,
            layout=layout,
            dtype=self.dtype,
            device=self.device,
            load_format=self.load_format,
            kv_cache_dtype=self.kv_cache_dtype,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            num_threads=num_threads,
            init_method=init_method,
            listen_fd=listen_fd,
        )

    def scheduler_config(self, num_blocks: int) -> SchedulerConfig:
        """The limits of the scheduler over a KV cache of `num_blocks`, the null block included."""
        return SchedulerConfig(
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_waiting=self.max_num_waiting,
            pipeline_stages=self.pipeline_parallel_size,
            prefix_caching=self.enable_prefix_caching,
        )

    def kv_bytes_per_block(self, spec: ModelSpec, layout: ShardLayout, dtype_bytes: int) -> int:
        """Bytes of one KV block on a shard whose dtype takes `dtype_bytes`."""
        return topology.kv_bytes_per_block(spec, layout, self.block_size, dtype_bytes, self.kv_cache_dtype)

    def plan_kv_memory(self, memories: Sequence[DeviceMemory], bytes_per_block: int) -> KVMemory:
        """See `kv_memory.plan_kv_memory`; raises as it does."""
        return kv_memory.plan_kv_memory(
            memories,
            bytes_per_block=bytes_per_block,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            gpu_memory_utilization=self.gpu_memory_utilization,
            shards_on_device=self.shards_per_node if self.device == "cpu" else 1,
            kv_cache_memory=self.kv_cache_memory,
            kv_cache_dtype=self.kv_cache_dtype,
        )
