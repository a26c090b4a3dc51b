"""The decision about KV memory: bounds, sharing, and messages with both numbers and the remedy."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytroupe.cluster.errors import ConfigError
from raytroupe.cluster.kv_memory import DeviceMemory, format_bytes, plan_kv_memory

MiB, GiB = 2**20, 2**30
BLOCK = 32 * 1024


def plan(free=16 * GiB, device="cpu", **options):
    memory = DeviceMemory(device, total=32 * GiB, free=free, weights=10 * MiB)
    sizes = {"bytes_per_block": BLOCK, "block_size": 16, "max_model_len": 2048, "max_num_seqs": 64}
    return plan_kv_memory(memory, **{**sizes, **options})


def test_default_takes_what_all_sequences_can_use():
    result = plan()
    assert result.num_blocks == 2 * 64 * 128 + 1
    assert result.reasoning == (
        "KV cache: 512 MiB of 16 GiB free (weights 10 MiB) = 16384 blocks of 16 tokens, "
        "128 requests of 2048 tokens (what all sequences can use)"
    )


@pytest.mark.parametrize(("device", "fraction"), [("cpu", 0.5), ("cuda", 0.9)])
def test_default_leaves_a_part_of_the_free_memory_and_divides_it_among_shards(device, fraction):
    result = plan(free=400 * MiB, device=device, shards_on_device=4)
    assert result.num_blocks == int(100 * MiB * fraction) // BLOCK
    assert "4 shards share it" in result.reasoning
    assert "what the device allows" in result.reasoning


def test_configured_memory_is_used_exactly():
    result = plan(kv_cache_memory=2 * GiB)
    assert (result.num_blocks, result.bytes_per_shard) == (2 * GiB // BLOCK, 2 * GiB)
    assert "as configured" in result.reasoning


def test_more_than_is_free_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"--kv-cache-memory 10 GiB .* 16 GiB of 32 GiB are free; .* at most 8 GiB"):
        plan(kv_cache_memory=10 * GiB, shards_on_device=2)


def test_too_small_for_one_request_is_refused_and_the_remedies_work():
    with pytest.raises(ConfigError) as caught:
        plan(kv_cache_memory=1 * MiB)
    message = str(caught.value)
    assert "1 MiB" in message
    assert "max_model_len = 2048" in message
    memory, length = map(
        int, re.search(r"kv-cache-memory to (\d+) bytes or .*max-model-len to (\d+)", message).groups()
    )
    assert plan(kv_cache_memory=memory).num_blocks == 129
    assert plan(kv_cache_memory=1 * MiB, max_model_len=length).num_blocks == 32


@pytest.mark.parametrize("free", [0, BLOCK, 2 * BLOCK])
def test_hardly_any_memory_is_refused(free):
    with pytest.raises(ConfigError, match="more memory"):
        plan(free=free)


@given(
    free=st.integers(0, 2**40),
    shards=st.integers(1, 16),
    block_size=st.sampled_from([4, 16, 256]),
    max_model_len=st.integers(2, 200_000),
    max_num_seqs=st.integers(1, 4096),
    bytes_per_block=st.integers(1, 2**24),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_a_plan_fits_the_device_and_holds_one_request(
    free, shards, block_size, max_model_len, max_num_seqs, bytes_per_block, device
):
    try:
        result = plan(
            free=free,
            device=device,
            shards_on_device=shards,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            bytes_per_block=bytes_per_block,
        )
    except ConfigError:
        return
    assert result.bytes_per_shard * shards <= free
    assert (result.num_blocks - 1) * block_size >= max_model_len


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1536, 10 * MiB, int(18.2 * GiB))] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "10 MiB",
        "18.2 GiB",
    ]
