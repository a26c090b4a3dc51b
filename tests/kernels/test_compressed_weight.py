"""A compressed weight is the same weight: the same rows and, bit for bit, the same products."""

import pytest
import torch
from torch import Tensor

from raytroupe.kernels.huge_pages import Arena
from raytroupe.kernels.native_kernels import NativeKernels
from raytroupe.kernels.packed_weight import GROUP, pack

BF16 = torch.bfloat16
SHAPES = [(1, 1), (15, 2), (64, 3), (65, 40), (129, 31), (192, 1537), (70, 3001)]
ROWS = (1, 2, 5, 6, 7, 8, 13, 18, 19, 32, 70, 400)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.dtype == BF16 else torch.int32)


def like_a_models(shape, generator):
    return (torch.randn(shape, generator=generator) * 0.02).to(BF16)


def of_every_size(shape, generator):
    """All 65 536 bit patterns are equally likely; no step can be compressed, or hardly one."""
    patterns = torch.randint(-(2**15), 2**15, shape, generator=generator).to(torch.int16)
    return patterns.view(BF16)


def mixed(shape, generator):
    """Mostly like a model's, with zeros of both signs, subnormals, infinities, and what is far too small or large."""
    weight = like_a_models(shape, generator)
    odd = torch.tensor([0.0, -0.0, 1e-40, -9e-39, torch.inf, -torch.inf, 1e-30, 3e38, 1.2e-38], dtype=BF16)
    chosen = odd[torch.randint(0, len(odd), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.002, chosen, weight)


def at_the_edge(shape, generator):
    """Exponents that lie up to 14 below the largest, or 15."""
    distance = torch.randint(0, 15, shape, generator=generator)
    distance += (torch.rand(shape, generator=generator) < 0.004) & (distance == 14)
    return torch.exp2(-distance.float()).to(BF16)


KINDS = [like_a_models, mixed, at_the_edge, lambda shape, _: torch.zeros(shape, dtype=BF16)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["model", "mixed", "edge", "zeros"])


def both(weight: Tensor, bias: Tensor | None = None):
    """The product with the weight as it is and with the compressed one."""
    plain, small = (NativeKernels(BF16, compress=compress) for compress in (False, True))
    return plain.linear(weight.clone(), bias), small.linear(weight.clone(), bias)


@kinds
def test_products_are_the_same_to_the_bit(instruction_set, kind, generator):
    for outputs, inputs in SHAPES:
        plain, small = both(kind((outputs, inputs), generator), torch.randn(outputs, generator=generator))
        assert not plain.weight.compressed
        x = torch.randn(max(ROWS), inputs, generator=generator).to(BF16)
        for rows in ROWS:
            assert torch.equal(bits(small(x[:rows])), bits(plain(x[:rows]))), (outputs, inputs, rows)
        assert torch.equal(bits(small.float32(x[:9])), bits(plain.float32(x[:9])))


@kinds
def test_rows_are_those_that_were_given(instruction_set, kind, generator):
    for outputs, inputs in SHAPES:
        weight = kind((outputs, inputs), generator)
        kernels = NativeKernels(BF16, compress=True)
        embedding = kernels.tied_linear(weight.clone())
        rows = torch.randint(0, outputs, (20,), generator=generator)
        assert torch.equal(bits(kernels.embed(embedding, rows, 1.0)), bits(weight[rows]))


def test_the_gated_product_and_sums_onto_the_residual_too(instruction_set, generator):
    plain, small = (NativeKernels(BF16, compress=compress) for compress in (False, True))
    weight, x = like_a_models((2 * 75, 300), generator), torch.randn(40, 300, generator=generator).to(BF16)
    first, second = (kernels.gated_linear(weight.clone(), None, "silu") for kernels in (plain, small))
    for rows in (1, 8, 40):
        assert torch.equal(first(x[:rows]), second(x[:rows]))
    first, second = both(weight)
    one, other = (torch.ones(40, 150, dtype=BF16) for _ in range(2))
    first.add_to(one, x, 0.5)
    second.add_to(other, x, 0.5)
    assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_threads_do_not_change_it(threads, generator):
    plain, small = both(like_a_models((1000, 700), generator))
    x = torch.randn(13, 700, generator=generator).to(BF16)
    expected = plain(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(small(x), expected)
    finally:
        torch.set_num_threads(before)


def test_a_models_weight_shrinks_to_about_three_quarters(generator):
    packed = pack(like_a_models((512, 1024), generator), compress=True)
    assert packed.compressed
    assert packed.data.nbytes < 0.78 * 512 * 1024 * 2


def test_every_other_step_shrinks_where_only_half_of_them_can(generator):
    """Steps of both kinds in one stream, in a pattern that is known."""
    weight = like_a_models((GROUP, 4000), generator).abs().clamp(min=1e-3)
    weight[0, ::8] = 1e-20  # steps 0, 4, 8 …: a quarter of them cannot
    packed = pack(weight, compress=True)
    assert packed.compressed
    index_and_bases = 64 + 2000 * 2 + (-2000 * 2) % 64
    assert packed.data.nbytes == index_and_bases + 500 * 256 + 1500 * 192


def test_what_does_not_shrink_stays_as_it_is(generator):
    weight = of_every_size((128, 256), generator)
    packed = pack(weight, compress=True)
    assert not packed.compressed
    assert torch.equal(bits(packed.data), bits(pack(weight).data))


def test_only_bfloat16_is_compressed(generator):
    assert not pack(torch.randn(64, 64, generator=generator), compress=True).compressed


def test_the_arena_holds_no_more_than_the_compressed_weight(generator):
    arena = Arena()
    taken = [pack(like_a_models((64, 1024), generator), arena, compress=True).data for _ in range(4)]
    span = taken[-1].data_ptr() + taken[-1].nbytes - taken[0].data_ptr()
    assert span < 4 * (64 * 1024 * 2 * 0.78 + 64)
    assert all(data.data_ptr() % 64 == 0 for data in taken)
