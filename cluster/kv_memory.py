"""How many KV blocks a replica gets, decided from what its devices have left, with the reasoning in words.

A block id means the same on every shard, so the number is one for all: callers pass the figures of the tightest shard
(the least free memory, the most bytes per block).
"""

from __future__ import annotations

import dataclasses

from .errors import ConfigError

USABLE_FRACTION = {"cpu": 0.5, "cuda": 0.9}
"""Of the memory that is free after loading, how much the cache takes at most. Activations and, on a CPU, everything
else that runs on the node live in the rest."""

USEFUL_COPIES = 2
"""A cache larger than this many times `max_num_seqs` requests of full length gains too little from prefix reuse."""


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """What one shard reports after its weights are loaded. Bytes."""

    device: str
    """"cpu" or "cuda"."""
    total: int
    free: int
    weights: int
    """Of this shard, already taken from `free`."""


@dataclasses.dataclass(frozen=True)
class KVMemory:
    """The decision."""

    num_blocks: int
    """Blocks to allocate on every shard: the null block and those that sequences can hold."""
    bytes_per_shard: int
    reasoning: str
    """One line for the log."""


def plan_kv_memory(
    memory: DeviceMemory,
    *,
    bytes_per_block: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    shards_on_device: int = 1,
    kv_cache_memory: int | None = None,
) -> KVMemory:
    """Divide a device's free memory among the shards on it.

    Args:
        memory: of the tightest shard, measured when all shards on the device have loaded their weights.
        bytes_per_block: on one shard, `topology.kv_bytes_per_block`.
        shards_on_device: shards that share this free memory: those on the node (CPU) or on the GPU.
        kv_cache_memory: bytes per shard that the user wants instead of the default.

    Raises:
        ConfigError: the memory does not suffice for one request of `max_model_len`, or the user wants more than is
            free.
    """
    share = memory.free // shards_on_device
    blocks_per_request = -(-max_model_len // block_size)
    useful = USEFUL_COPIES * max_num_seqs * blocks_per_request + 1
    if kv_cache_memory is None:
        affordable = int(share * USABLE_FRACTION[memory.device]) // bytes_per_block
        num_blocks = min(useful, affordable)
        source = "what all sequences can use" if useful <= affordable else "what the device allows"
    else:
        _check_wish(kv_cache_memory, memory, shards_on_device)
        num_blocks = kv_cache_memory // bytes_per_block
        source = "as configured"

    usable = num_blocks - 1  # block 0 is the null block
    if usable < blocks_per_request:
        raise ConfigError(
            f"KV cache too small: {format_bytes(num_blocks * bytes_per_block)} per shard "
            f"({_describe(memory, shards_on_device)}) hold {max(usable, 0) * block_size} tokens, and one request of "
            f"max_model_len = {max_model_len} needs {format_bytes((blocks_per_request + 1) * bytes_per_block)}; "
            + _remedy((blocks_per_request + 1) * bytes_per_block, usable * block_size)
        )
    size = num_blocks * bytes_per_block
    reasoning = (
        f"KV cache: {format_bytes(size)} of {_describe(memory, shards_on_device)} = {usable} blocks of {block_size} "
        f"tokens, {usable // blocks_per_request} requests of {max_model_len} tokens ({source})"
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
    if kv_cache_memory * shards_on_device > memory.free:
        raise ConfigError(
            f"--kv-cache-memory {format_bytes(kv_cache_memory)} for each of {shards_on_device} shard(s) is more than "
            f"the {memory.device} device has: {format_bytes(memory.free)} of {format_bytes(memory.total)} are free; "
            f"lower it to at most {format_bytes(memory.free // shards_on_device)} or leave it out"
        )


def _describe(memory: DeviceMemory, shards_on_device: int) -> str:
    shared = f", {shards_on_device} shards share it" if shards_on_device > 1 else ""
    return f"{format_bytes(memory.free)} free (weights {format_bytes(memory.weights)}{shared})"


def _remedy(needed: int, tokens: int) -> str:
    raise_memory = f"raise --kv-cache-memory to {needed} bytes"
    if tokens < 2:
        return f"{raise_memory} or use a device with more memory"
    return f"{raise_memory} or lower --max-model-len to {tokens}"
