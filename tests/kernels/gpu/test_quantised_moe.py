import pytest
import torch
from quantised_samples import random_weight

from raytroupe.kernels.gpu.expert_sort import sort_by_expert
from raytroupe.kernels.gpu.quantised_moe import (
    GroupedQuantisedConfig,
    TritonQuantisedExperts,
    can_group,
    candidates,
    grouped_quantised,
    pack_experts,
)
from raytroupe.kernels.gpu.triton_kernels import TritonKernels
from raytroupe.kernels.quantised_linear import QuantisedLinear
from raytroupe.kernels.torch_kernels import TorchKernels

CPU = torch.device("cpu")
EXPERTS, HIDDEN, WIDTH = 4, 64, 32


def experts_of(generator, **options):
    """Gate and up, and down, of every expert."""
    options = {"group": 32} | options
    return (
        [random_weight(generator, 2 * WIDTH, HIDDEN, **options) for _ in range(EXPERTS)],
        [random_weight(generator, HIDDEN, WIDTH, **options) for _ in range(EXPERTS)],
    )


def routed(generator, tokens):
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    return TorchKernels(CPU, torch.float32).route(logits, 2, True)


@pytest.mark.launches("grouped_quantised_kernel")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zeros": True},
        {"bits": 8, "group": 1000},
        {"bits": 8, "floats": True, "group": 1000},
        {"bits": 8, "group": 1000, "activations": torch.int8},
    ],
)
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_are_the_reference(options, tokens, generator):
    gate_up, down = experts_of(generator, **options)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    weights, ids = routed(generator, tokens)
    kernels = TritonKernels(CPU, torch.float32)
    got = kernels.experts(gate_up, down, "silu")(x, weights, ids)
    assert kernels.saved_bytes == sum(w.nbytes for w in (*gate_up, *down)) - nbytes(gate_up, down)
    expected = TorchKernels(CPU, torch.float32).experts(gate_up, down, "silu")(x, weights, ids)
    if "activations" in options:
        # What is rounded may be one last bit of float32 away, and so on the other side of a border of int8.
        assert (got - expected).norm() <= 0.01 * expected.norm()
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def nbytes(gate_up, down):
    return pack_experts(gate_up).weight.nbytes + pack_experts(down).weight.nbytes


@pytest.mark.launches("grouped_linear_kernel")
@pytest.mark.parametrize("options", [{"ordered": True}, {"group": 8}])
def test_what_cannot_be_grouped_is_expanded(options, generator):
    gate_up, down = experts_of(generator, **options)
    assert not can_group(gate_up)
    x = torch.randn(3, HIDDEN, generator=generator)
    weights, ids = routed(generator, 3)
    got = TritonKernels(CPU, torch.float32).experts(gate_up, down, "silu")(x, weights, ids)
    expected = TorchKernels(CPU, torch.float32).experts(gate_up, down, "silu")(x, weights, ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_experts_that_differ_are_not_grouped(generator):
    four, eight = (random_weight(generator, 8, 64, bits=bits) for bits in (4, 8))
    assert can_group([four, four])
    assert not can_group([four, eight])


def test_packed_experts_keep_zeros_that_only_some_have(generator):
    plain, shifted = random_weight(generator, 8, 64), random_weight(generator, 8, 64, zeros=True)
    zeros = pack_experts([plain, shifted]).weight.zeros
    assert zeros is not None
    assert torch.equal(zeros, torch.cat((torch.full((2, 8), 8, dtype=torch.uint8), shifted.zeros.t())))


@pytest.mark.launches("grouped_quantised_kernel")
@pytest.mark.parametrize("block_m", [16, 64])
def test_a_broken_row_does_not_touch_the_others_and_blocks_may_be_many(block_m, generator):
    weights = [random_weight(generator, 40, 64) for _ in range(EXPERTS)]
    ids = torch.randint(0, EXPERTS, (30, 1), generator=generator, dtype=torch.int32)
    x = torch.randn(30, 64, generator=generator)
    x[7] = torch.nan
    out = torch.empty(30, 40)
    config = GroupedQuantisedConfig(block_n=16, group=3, warps=4, stages=2)
    grouped_quantised(x, pack_experts(weights), out, sort_by_expert(ids, EXPERTS, block_m), config)
    for row in range(30):
        if row == 7:
            assert out[row].isnan().all()
        else:
            expected = QuantisedLinear(weights[int(ids[row, 0])])(x[row : row + 1])[0]
            torch.testing.assert_close(out[row], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.launches("grouped_quantised_kernel")
def test_bfloat16_is_rounded_as_with_expanded_weights(generator):
    gate_up, down = experts_of(generator)
    x = torch.randn(2, HIDDEN, generator=generator).bfloat16()
    weights, ids = routed(generator, 2)
    got = TritonQuantisedExperts(gate_up, down, "silu", torch.bfloat16)(x, weights, ids)
    expected = TorchKernels(CPU, torch.bfloat16).experts(gate_up, down, "silu")(x, weights, ids)
    # Of both sides, a dozen numbers on the way are rounded to eight bits of mantissa.
    assert (got.float() - expected.float()).norm() <= 2e-2 * expected.float().norm()


def test_candidates_are_distinct():
    for gated in (False, True):
        for block_m in (16, 128):
            found = candidates(block_m, gated=gated)
            assert len(set(found)) == len(found) >= 3
