"""Keys and values of 8 bits in the compiled kernels: what is stored, and what every stored number is read as."""

import math

import pytest
import torch

from raytroupe.kernels.attention_metadata import AttentionMetadata
from raytroupe.kernels.native_kernels import NativeKernels
from raytroupe.kernels.quantised_kv import LIMITS, quantise
from raytroupe.kernels.torch_kernels import TorchKernels

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS = 8, 5

stored_types = pytest.mark.parametrize("stored", LIMITS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def metadata(slots, contexts):
    """A decode step of rows in block 0, 1 …, which writes to `slots`."""
    rows = len(contexts)
    return AttentionMetadata(
        positions=torch.tensor(contexts) - 1,
        slot_mapping=slots,
        query_start=torch.arange(rows + 1).int(),
        context_lens=torch.tensor(contexts).int(),
        block_tables=torch.arange(rows).int()[:, None],
        decode_rows=rows,
        counts=[1] * rows,
        contexts=contexts,
    )


def stores(kernels, qkv, rotation, kv_heads, stored, slots, norms=None):
    """Keys, values and both scales after a step that writes them."""
    head_dim = qkv.shape[-1]
    caches = [torch.zeros(kv_heads, NUM_BLOCKS, BLOCK, head_dim, dtype=stored) for _ in range(2)]
    scales = tuple(torch.full((kv_heads, NUM_BLOCKS, BLOCK), -1.0) for _ in range(2))
    plan = kernels.plan(metadata(slots, [1] * len(slots)), BLOCK)
    kernels.rotate_and_store(qkv.clone(), rotation, *caches, plan, norms=norms, eps=1e-5, scales=scales)
    return caches[0].float(), caches[1].float(), *scales


@stored_types
@dtypes
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(7, 4), (16, 16), (20, 12), (80, 80), (128, 128)])
def test_the_reference_is_stored(instruction_set, dtype, stored, head_dim, rotary_dim, generator):
    rows, heads, kv_heads = 5, 3, 2
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    qkv[0, -1], qkv[1, -1, 0], qkv[2, -2, 1], qkv[3, -1], qkv[4, -1] = 0, math.inf, math.nan, -math.inf, 1e-42
    angles = torch.rand(rows, rotary_dim // 2, generator=generator) * 7
    slots = torch.randperm(NUM_BLOCKS * BLOCK, generator=generator)[:rows]
    arguments = (qkv, (angles.cos(), angles.sin()), kv_heads, stored, slots)
    keys, values, key_scales, value_scales = stores(TorchKernels(CPU, dtype), *arguments)
    my_keys, my_values, my_key_scales, my_value_scales = stores(NativeKernels(dtype), *arguments)
    assert torch.equal(my_values, values)
    assert torch.equal(my_value_scales, value_scales)
    # A rotated number may differ in its last digit, and so lie on another side between two that can be stored.
    torch.testing.assert_close(my_key_scales, key_scales, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    step = 1.0 if stored == torch.int8 else 32.0
    assert (my_keys - keys).abs().max() <= step
    assert torch.equal(my_keys[:, slots // BLOCK, slots % BLOCK].isfinite(), torch.ones(kv_heads, rows, head_dim) > 0)


@stored_types
def test_numbers_between_two_that_can_be_stored_are_rounded_as_the_reference_rounds(instruction_set, stored):
    if stored == torch.int8:
        exact = torch.arange(-127, 128).float()
    else:
        exact = torch.arange(256, dtype=torch.uint8).view(stored).float()
        exact = exact[exact.isfinite()].sort().values
    halves = (exact[1:] + exact[:-1]) / 2
    near = torch.cat([exact, halves, torch.nextafter(halves, halves + 1), torch.nextafter(halves, halves - 1)])
    limit = LIMITS[stored]
    heads = torch.nn.functional.pad(near, (0, -len(near) % 31)).view(-1, 31)
    heads = torch.cat([heads, torch.full((len(heads), 1), limit)], 1)  # every head's scale is 1
    expected, scales = quantise(heads, stored)
    assert (scales == 1).all()
    found = []
    for part in heads.split(NUM_BLOCKS * BLOCK):
        qkv = part[:, None].repeat(1, 3, 1)
        nothing = torch.zeros(len(part), 0)
        slots = torch.arange(len(part))
        _, values, *_ = stores(NativeKernels(torch.float32), qkv, (nothing, nothing), 1, stored, slots)
        found.append(values.flatten(0, 2)[: len(part)])
    assert torch.equal(torch.cat(found), expected.float())


@stored_types
@dtypes
@pytest.mark.parametrize("heads", [1, 6], ids=["few rows", "many rows"])
def test_every_stored_number_is_read_as_what_it_means(instruction_set, dtype, stored, heads):
    """The only token that a row sees has weight 1: the result is its value."""
    codes = torch.arange(256, dtype=torch.uint8).view(stored)
    if stored != torch.int8:
        codes = torch.where(codes.float().isfinite(), codes.float(), 0.0).to(stored)
    caches = [codes.view(torch.uint8).repeat(1, 2, BLOCK, 1).view(stored) for _ in range(2)]
    scales = tuple(torch.full((1, 2, BLOCK), 0.37) for _ in range(2))
    kernels = NativeKernels(dtype)
    query = torch.ones(2, heads, 256, dtype=dtype)
    plan = kernels.plan(metadata(torch.tensor([0, BLOCK]), [1, 1]), BLOCK)
    out = kernels.attention(query, *caches, plan, scale=0.1, window=None, softcap=None, scales=scales)
    expected = (codes.float() * 0.37).expand(2, heads, 256).flatten(1)
    bound = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(out.float(), expected, rtol=bound, atol=0)
