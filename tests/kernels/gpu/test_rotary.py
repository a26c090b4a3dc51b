import math

import pytest
import torch

from raytroupe.kernels.attention_metadata import AttentionMetadata
from raytroupe.kernels.gpu.rotary import rotate_and_store, rotation
from raytroupe.kernels.torch_kernels import TorchKernels

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS = 8, 5


@pytest.mark.launches("rotation_kernel")
@pytest.mark.parametrize("per_position", [False, True])
def test_cosines_and_sines(per_position, generator):
    positions = torch.tensor([0, 1, 77, 131_071])
    frequencies = torch.rand(4, 12, generator=generator) if per_position else torch.rand(12, generator=generator)
    out = (torch.full((4, 12), math.nan), torch.full((4, 12), math.nan))
    expected = TorchKernels(CPU, torch.float32).rotation(positions, frequencies, 1.3)
    rotation(positions, frequencies, 1.3, out)
    for mine, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def caches(kv_heads, head_dim, dtype):
    return [torch.zeros(kv_heads, NUM_BLOCKS, BLOCK, head_dim, dtype=dtype) for _ in range(2)]


def metadata(slots):
    none = torch.zeros(1, dtype=torch.int32)
    return AttentionMetadata(slots, slots, none, none, none[None], 0, [], [])


@pytest.mark.launches("rotate_and_store_kernel")
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (20, 12), (10, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn])
def test_queries_and_cache_are_the_reference(norms, head_dim, rotary_dim, dtype, stored, generator):
    tokens, heads, kv_heads = 5, 6, 2
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    qkv[1, -1], qkv[2, 6], qkv[3, -1, 0] = math.inf, 0, math.nan
    angles = torch.rand(tokens, rotary_dim // 2, generator=generator) * 7
    weights = (torch.rand(head_dim, generator=generator), torch.rand(head_dim, generator=generator))
    slots = torch.randperm(NUM_BLOCKS * BLOCK, generator=generator)[:tokens]
    results = []
    for store in (reference, rotate_and_store):
        k_cache, v_cache = caches(kv_heads, head_dim, stored or dtype)
        scales = None if stored is None else tuple(torch.zeros(kv_heads, NUM_BLOCKS, BLOCK) for _ in range(2))
        query = store(
            qkv.clone(), (angles.cos(), angles.sin()), k_cache, v_cache, slots, weights if norms else None, 1e-5, scales
        )
        results.append((query, k_cache.float(), v_cache.float(), *(scales or ())))
    (query, keys, values, *scales), (my_query, my_keys, my_values, *my_scales) = results
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(my_query, query, **close)
    for mine, theirs in zip(my_scales, scales, strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    if stored is not None:  # one step of the grid may lie between two roundings of the same number
        close = {"rtol": 0.13, "atol": 1.01}
    torch.testing.assert_close(my_keys, keys, **close)
    torch.testing.assert_close(my_values, values, **close)
    untouched = torch.ones(NUM_BLOCKS * BLOCK, dtype=torch.bool)
    untouched[slots] = False
    assert not my_keys.flatten(1, 2)[:, untouched].any()


def reference(qkv, rotation, k_cache, v_cache, slots, norms, eps, scales):
    return TorchKernels(CPU, qkv.dtype).rotate_and_store(
        qkv, rotation, k_cache, v_cache, type("Plan", (), {"metadata": metadata(slots)}), norms=norms, eps=eps,
        scales=scales,
    )  # fmt: skip
