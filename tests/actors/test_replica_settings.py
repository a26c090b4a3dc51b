from pathlib import Path

import pytest

from raytroupe.actors.replica_settings import ReplicaSettings
from raytroupe.cluster.config import load_config
from raytroupe.cluster.kv_memory import DeviceMemory
from raytroupe.cluster.topology import ShardLayout

BLOCK_BYTES = 1 << 20


def settings_of(device="cpu", shards_per_node=1, **fields):
    [model] = load_config({"models": [{"model": "folder", **fields}]}).models
    return ReplicaSettings.of(
        model, folder=Path("folder"), device=device, max_model_len=64, shards_per_node=shards_per_node
    )


def blocks_of(settings):
    memory = DeviceMemory(settings.device, total=64 << 30, free=2 << 30, weights=0)
    return settings.plan_kv_memory([memory], BLOCK_BYTES).num_blocks


def test_shards_of_a_node_divide_its_memory_and_those_on_gpus_have_their_own():
    assert blocks_of(settings_of(shards_per_node=8)) < blocks_of(settings_of())
    sizes = {"kv_cache_memory": 1 << 30}
    assert blocks_of(settings_of("cuda", 8, **sizes)) == blocks_of(settings_of("cuda", 1, **sizes))


@pytest.mark.parametrize("stored", ["auto", "int8"])
def test_the_log_says_what_the_kv_cache_is_stored_in(stored):
    memory = DeviceMemory("cpu", total=64 << 30, free=2 << 30, weights=0)
    reasoning = settings_of(kv_cache_dtype=stored).plan_kv_memory([memory], BLOCK_BYTES).reasoning
    assert reasoning.startswith("KV cache: " if stored == "auto" else f"KV cache in {stored}: ")


def test_scheduler_and_shards_are_told_the_same_limits():
    settings = settings_of(pipeline_parallel_size=3, max_num_seqs=5, enable_prefix_caching=False, block_size=8)
    scheduler, shard = settings.scheduler_config(num_blocks=9), settings.shard_config(ShardLayout(), num_threads=2)
    for field in ("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        assert getattr(scheduler, field) == getattr(shard, field) == getattr(settings, field)
    assert (scheduler.num_blocks, scheduler.pipeline_stages, scheduler.prefix_caching) == (9, 3, False)
