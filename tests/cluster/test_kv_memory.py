"""The decision about KV memory: bounds, sharing, and messages with both numbers and the remedy."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytroupe.cluster.errors import ConfigError
from raytroupe.cluster.kv_memory import DeviceMemory, format_bytes, plan_kv_memory

MiB, GiB = 2**20, 2**30
BLOCK = 32 * 1024


def plan(free=16 * GiB, device="cpu", step=0, reserve=0, **options):
    memory = DeviceMemory(device, total=32 * GiB, free=free, weights=10 * MiB, step=step, reserve=reserve)
    sizes = {"bytes_per_block": BLOCK, "block_size": 16, "max_model_len": 2048, "max_num_seqs": 64}
    return plan_kv_memory([memory], **{**sizes, **options})


def test_default_takes_what_all_sequences_can_use():
    result = plan()
    assert result.num_blocks == 2 * 64 * 128 + 1
    assert result.reasoning == (
        "KV cache: 512 MiB of 16 GiB free (weights 10 MiB) = 16384 blocks of 16 tokens, "
        "128 requests of 2048 tokens (what all sequences can use)"
    )


def test_a_cpu_keeps_half_of_its_free_memory_and_divides_the_rest_among_shards():
    result = plan(free=400 * MiB, shards_on_device=4)
    assert result.num_blocks == 50 * MiB // BLOCK
    assert "4 shards share it" in result.reasoning
    assert "what the device allows" in result.reasoning


def test_a_gpu_is_filled_to_its_utilization_less_a_step_and_the_reserve():
    sizes = {"free": 20 * GiB, "device": "cuda", "step": 3 * GiB, "reserve": GiB // 2, "max_num_seqs": 4096}
    result = plan(**sizes, gpu_memory_utilization=0.75)
    assert result.bytes_per_shard == 24 * GiB - 12 * GiB - 3 * GiB - GiB // 2
    assert result.reasoning == (
        "KV cache: 8.5 GiB of 32 GiB × 0.75 - 12 GiB in use (weights 10 MiB) - 3 GiB for a step - 512 MiB reserve = "
        "278527 blocks of 16 tokens, 2175 requests of 2048 tokens (what the device allows)"
    )
    assert plan(**sizes, gpu_memory_utilization=1.0).bytes_per_shard == result.bytes_per_shard + 8 * GiB


def test_the_shard_with_the_least_left_decides_not_the_one_with_the_least_free():
    roomy = DeviceMemory("cuda", 32 * GiB, 19 * GiB, 0, step=GiB)
    tight = DeviceMemory("cuda", 32 * GiB, 20 * GiB, 0, step=4 * GiB)
    options = {"bytes_per_block": BLOCK, "block_size": 16, "max_model_len": 2048, "max_num_seqs": 4096}
    both = plan_kv_memory([roomy, tight], **options, gpu_memory_utilization=1.0)
    assert both.bytes_per_shard == 16 * GiB
    assert "4 GiB for a step" in both.reasoning


def test_a_gpu_that_is_full_is_refused_with_every_figure_and_remedies():
    with pytest.raises(ConfigError) as caught:
        plan(free=3 * GiB, device="cuda", step=GiB, reserve=GiB // 2)
    assert str(caught.value) == (
        "KV cache too small: 0 B per shard (32 GiB × 0.9 - 29 GiB in use (weights 10 MiB) - 1 GiB for a step - 512 MiB "
        "reserve) hold 0 tokens, and one request of max_model_len = 2048 needs 4 MiB; raise --gpu-memory-utilization, "
        "lower --max-num-batched-tokens or raise --tensor-parallel-size"
    )
    assert plan(free=3 * GiB, device="cuda", step=GiB, reserve=GiB // 2, gpu_memory_utilization=0.96).num_blocks > 129


def test_a_gpus_remedy_of_a_shorter_context_works():
    tight = {"free": 4 * GiB + 3 * MiB, "device": "cuda", "gpu_memory_utilization": 0.875}
    with pytest.raises(ConfigError) as caught:
        plan(**tight)
    length = int(re.search(r"or lower --max-model-len to (\d+)", str(caught.value))[1])
    assert plan(**tight, max_model_len=length).num_blocks == 96


def test_configured_memory_is_used_exactly():
    result = plan(kv_cache_memory=2 * GiB)
    assert (result.num_blocks, result.bytes_per_shard) == (2 * GiB // BLOCK, 2 * GiB)
    assert "as configured" in result.reasoning


def test_more_than_is_free_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"--kv-cache-memory 10 GiB .* 16 GiB of 32 GiB are free; .* at most 8 GiB"):
        plan(kv_cache_memory=10 * GiB, shards_on_device=2)


def test_on_a_gpu_a_step_and_the_reserve_stay_free_of_the_wish():
    sizes = {"free": 16 * GiB, "device": "cuda", "step": 3 * GiB, "reserve": GiB}
    assert plan(**sizes, kv_cache_memory=12 * GiB).bytes_per_shard == 12 * GiB
    with pytest.raises(
        ConfigError, match=r"13 GiB .* 16 GiB of 32 GiB are free, of which 4 GiB must stay so; .* at most 12 GiB"
    ):
        plan(**sizes, kv_cache_memory=13 * GiB)


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
    free=st.integers(0, 32 * GiB),
    shards=st.integers(1, 16),
    block_size=st.sampled_from([4, 16, 256]),
    max_model_len=st.integers(2, 200_000),
    max_num_seqs=st.integers(1, 4096),
    bytes_per_block=st.integers(1, 2**24),
    device=st.sampled_from(["cpu", "cuda"]),
    step=st.integers(0, 2**34),
    utilization=st.floats(0.01, 1.0),
)
def test_a_plan_fits_the_device_and_holds_one_request(
    free, shards, block_size, max_model_len, max_num_seqs, bytes_per_block, device, step, utilization
):
    try:
        result = plan(
            free=free,
            device=device,
            step=step if device == "cuda" else 0,
            gpu_memory_utilization=utilization,
            shards_on_device=shards,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            bytes_per_block=bytes_per_block,
        )
    except ConfigError:
        return
    assert result.bytes_per_shard * shards <= (free - step if device == "cuda" else free / 2)
    assert (result.num_blocks - 1) * block_size >= max_model_len


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1536, 10 * MiB, int(18.2 * GiB))] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "10 MiB",
        "18.2 GiB",
    ]
