"""How many KV blocks a replica gets, decided from what its devices have left, with the reasoning in words.

A block id means the same on every shard, so the number is one for all and the tightest shard decides: it has the least
memory left, and is taken to need the most bytes per block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .errors import ConfigError

CPU_FRACTION = 0.5
"""Of a node's memory that is free after loading, how much the cache takes at most. Activations and everything else that
runs on the node live in the rest."""

CUDA_RESERVE = 512 * 2**20
"""Bytes that stay free on a GPU for what is not there yet when a step is measured: CUDA graphs with their memory pool,
and what torch's allocator loses to fragments over time."""

USEFUL_COPIES = 2
"""A cache larger than this many times `max_num_seqs` requests of full length gains too little from prefix reuse."""


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """What one shard reports after its weights are loaded. Bytes."""

    device: str
    """"cpu" or "cuda"."""
    total: int
    free: int
    """Before the first step."""
    weights: int
    """Of this shard, already taken from `free`."""
    step: int = 0
    """The most that a step was measured to take beside weights and cache; 0 on a CPU, where none is measured."""
    reserve: int = 0
    """To be left besides."""

    @property
    def in_use(self) -> int:
        """By whomever."""
        return self.total - self.free

    def usable(self, gpu_memory_utilization: float) -> int:
        """What is left for the caches of all shards on the device; negative where nothing is."""
        if self.device == "cpu":
            return int(self.free * CPU_FRACTION)
        return int(self.total * gpu_memory_utilization) - self.in_use - self.step - self.reserve


@dataclasses.dataclass(frozen=True)
class KVMemory:
    """The decision."""

    num_blocks: int
    """Blocks to allocate on every shard: the null block and those that sequences can hold."""
    bytes_per_shard: int
    reasoning: str
    """One line for the log."""


def plan_kv_memory(
    memories: Sequence[DeviceMemory],
    *,
    bytes_per_block: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    gpu_memory_utilization: float = 0.9,
    shards_on_device: int = 1,
    kv_cache_memory: int | None = None,
    kv_cache_dtype: str = "auto",
) -> KVMemory:
    """Divide the memory of the tightest device among the shards on it.

    A CPU's cache takes `CPU_FRACTION` of what is free. A GPU's takes total * gpu_memory_utilization, less what is in
    use, less what a step takes, less the reserve.

    Args:
        memories: of all shards, measured when all shards on the device have loaded their weights.
        bytes_per_block: on the shard that needs most, `topology.kv_bytes_per_block`.
        gpu_memory_utilization: part of a GPU that may be in use in the end, by whomever.
        shards_on_device: shards that share a device's memory: those on the node (CPU) or on the GPU.
        kv_cache_memory: bytes per shard that the user wants instead of the default.
        kv_cache_dtype: as configured, for the reasoning.

    Raises:
        ConfigError: the memory does not suffice for one request of `max_model_len`, or the user wants more than is
            free.
    """
    memory = min(memories, key=lambda memory: memory.usable(gpu_memory_utilization))
    blocks_per_request = -(-max_model_len // block_size)
    useful = USEFUL_COPIES * max_num_seqs * blocks_per_request + 1
    if kv_cache_memory is None:
        affordable = max(0, memory.usable(gpu_memory_utilization)) // shards_on_device // bytes_per_block
        num_blocks = min(useful, affordable)
        source = "what all sequences can use" if useful <= affordable else "what the device allows"
    else:
        _check_wish(kv_cache_memory, memory, shards_on_device)
        num_blocks = kv_cache_memory // bytes_per_block
        source = "as configured"
    described = _describe(memory, shards_on_device, gpu_memory_utilization if kv_cache_memory is None else None)

    usable = num_blocks - 1  # block 0 is the null block
    if usable < blocks_per_request:
        needed = (blocks_per_request + 1) * bytes_per_block
        by_share = memory.device == "cuda" and kv_cache_memory is None
        raise ConfigError(
            f"KV cache too small: {format_bytes(num_blocks * bytes_per_block)} per shard ({described}) hold "
            f"{max(usable, 0) * block_size} tokens, and one request of max_model_len = {max_model_len} needs "
            f"{format_bytes(needed)}; {_remedy(needed, usable * block_size, by_share)}"
        )
    size = num_blocks * bytes_per_block
    stored = "" if kv_cache_dtype == "auto" else f" in {kv_cache_dtype}"
    reasoning = (
        f"KV cache{stored}: {format_bytes(size)} of {described} = {usable} blocks of {block_size} tokens, "
        f"{usable // blocks_per_request} requests of {max_model_len} tokens ({source})"
    )
    return KVMemory(num_blocks, size, reasoning)


def format_bytes(count: int) -> str:
    """A size as people write it: 512 MiB, 18.2 GiB."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def _check_wish(kv_cache_memory: int, memory: DeviceMemory, shards_on_device: int) -> None:
    available = max(0, memory.free - memory.step - memory.reserve)  # for a step, and in reserve
    if kv_cache_memory * shards_on_device > available:
        beside = f", of which {format_bytes(memory.free - available)} must stay so" if available < memory.free else ""
        raise ConfigError(
            f"--kv-cache-memory {format_bytes(kv_cache_memory)} for each of {shards_on_device} shard(s) is more than "
            f"the {memory.device} device has: {format_bytes(memory.free)} of {format_bytes(memory.total)} are free"
            f"{beside}; lower it to at most {format_bytes(available // shards_on_device)} or leave it out"
        )


def _describe(memory: DeviceMemory, shards_on_device: int, gpu_memory_utilization: float | None) -> str:
    """The figures that lead to the size; utilization None: it does not matter."""
    loaded = f"weights {format_bytes(memory.weights)}"
    if shards_on_device > 1:
        loaded += f", {shards_on_device} shards share it"
    if memory.device == "cpu" or gpu_memory_utilization is None:
        return f"{format_bytes(memory.free)} free ({loaded})"
    return (
        f"{format_bytes(memory.total)} × {gpu_memory_utilization:g} - {format_bytes(memory.in_use)} in use ({loaded}) "
        f"- {format_bytes(memory.step)} for a step - {format_bytes(memory.reserve)} reserve"
    )


def _remedy(needed: int, tokens: int, by_share: bool) -> str:
    """`by_share`: the size came from a part of a GPU's memory."""
    if by_share:
        more = "raise --gpu-memory-utilization, lower --max-num-batched-tokens or raise --tensor-parallel-size"
        return more if tokens < 2 else f"{more}, or lower --max-model-len to {tokens}"
    raise_memory = f"raise --kv-cache-memory to {needed} bytes"
    if tokens < 2:
        return f"{raise_memory} or use a device with more memory"
    return f"{raise_memory} or lower --max-model-len to {tokens}"
