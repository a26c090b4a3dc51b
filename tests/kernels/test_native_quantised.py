"""Compiled products with quantised weights: exact where x is, else as close as 8 bits allow, whatever the batch."""

import itertools

import pytest
import torch
from guarded import SENTINEL, Guarded, GuardedKernels, surrounded_by_nan
from quantised_weights import random_quantised
from torch.nn import functional

from raytroupe.kernels.native_kernels import NativeKernels
from raytroupe.kernels.quantised_linear import QuantisedLinear

ROWS = (1, 2, 3, 4, 5, 6, 7, 75)
MANY_ROWS = 400
"""75 are more than twelve tiles, 400 more than one item."""
SHAPES = [
    *((outputs, 64, 32) for outputs in (1, 17, 64, 65)),
    *((33, inputs, group) for inputs, group in ((8, 8), (40, 8), (30, 0), (2304, 0), (416, 128), (512, 256))),
]
"""(outputs, inputs, group size; 0: the whole row). 416 inputs end with a short group."""
KINDS = [
    {"bits": bits, "zeros": zeros, "scales": scales, "ordered": ordered, "activations": activations}
    for bits, zeros, (scales, ordered, activations) in itertools.product(
        (4, 8),
        (False, True),
        ((torch.bfloat16, False, None), (torch.float16, True, None), (torch.float32, False, torch.int8)),
    )
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def exact_inputs(rows, inputs, dtype, generator):
    """Every group's scale is 1."""
    return torch.randint(-1, 2, (rows, inputs), generator=generator).mul_(127).to(dtype)


def in_order(x, weight):
    return x if weight.order is None else x[:, weight.order]


@dtypes
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(str(value) for value in kind.values()))
def test_inputs_that_8_bits_hold_give_the_exact_sum(instruction_set, dtype, kind, generator):
    torch.set_num_threads(2)
    kernels = GuardedKernels()
    for outputs, inputs, group_size in SHAPES:
        weight = random_quantised(outputs, inputs, generator, group_size=group_size, **kind)
        bias = torch.randint(-3, 4, (outputs,), generator=generator).to(dtype) if outputs % 2 else None
        linear = kernels.linear(weight, bias)
        x = surrounded_by_nan(exact_inputs(MANY_ROWS, inputs, dtype, generator))
        everything = in_order(x, weight).double() @ weight.dequantise(torch.float64).T
        everything += 0 if bias is None else bias.double()
        for rows in (*ROWS, MANY_ROWS) if inputs == 416 else ROWS:
            case, expected = f"{rows} rows, {inputs} → {outputs}", everything[:rows]
            assert torch.equal(linear(x[:rows]), expected.to(dtype)), case
            assert torch.equal(linear.float32(x[:rows]), expected.float()), case
            kernels.check()
            hidden = Guarded(rows, outputs, dtype, margin=SENTINEL, inside=3.0)
            linear.add_to(hidden.inside, x[:rows], -0.5)
            assert torch.equal(hidden.inside, (3 - 0.5 * expected).to(dtype)), case
            hidden.assert_margins()


@dtypes
@pytest.mark.parametrize("bits", [4, 8])
def test_other_inputs_lose_half_a_step_at_most(instruction_set, dtype, bits, generator):
    kernels = NativeKernels(dtype)
    for (outputs, inputs, group_size), rows in itertools.product(SHAPES, (1, 5, 20)):
        weight = random_quantised(outputs, inputs, generator, bits=bits, group_size=group_size, zeros=True)
        linear = kernels.linear(weight)
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        dense = weight.dequantise(torch.float64)
        expected = x.double() @ dense.T
        size = linear.weight.group_size
        grouped = functional.pad(x.double(), (0, -inputs % size)).unflatten(1, (-1, size))
        steps = (grouped.abs().amax(-1) / 127).repeat_interleave(size, 1)[:, :inputs]
        bound = 0.501 * steps @ dense.T.abs() + 1e-5 * (x.double().abs() @ dense.T.abs())
        assert ((linear.float32(x).double() - expected).abs() <= bound).all()
        rounded = linear(x).double()
        assert ((rounded - expected).abs() <= bound + expected.abs() * 2**-8).all()


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "plain"])
def test_gate_and_up_in_one_pass(instruction_set, dtype, activation, biased, generator):
    kernels = GuardedKernels()
    for width, bits, zeros in itertools.product((1, 17, 32, 70), (4, 8), (False, True)):
        weight = random_quantised(2 * width, 96, generator, bits=bits, group_size=32, zeros=zeros)
        bias = torch.randn(2 * width, generator=generator).to(dtype) if biased else None
        gated = kernels.gated_linear(weight, bias, activation)
        x = exact_inputs(20, 96, dtype, generator) / 2**12
        y = x.double() @ weight.dequantise(torch.float64).T + (0 if bias is None else bias.double())
        gate, up = y.chunk(2, 1)
        expected = ACTIVATIONS[activation](gate) * up
        for rows in (1, 2, 9, 20):
            tolerance = 2**-8 if dtype == torch.bfloat16 else 2**-19
            assert torch.allclose(gated(x[:rows]).double(), expected[:rows], rtol=tolerance, atol=1e-5)
            kernels.check()


def test_a_row_depends_on_nothing_beside_it(instruction_set, generator):
    torch.set_num_threads(1)
    kernels = NativeKernels(torch.bfloat16)
    for kind in KINDS[::3]:
        linear = kernels.linear(random_quantised(200, 384, generator, group_size=128, **kind))
        x = torch.randn(400, 384, generator=generator).bfloat16()
        alone = torch.cat([linear(x[row : row + 1]) for row in range(len(x))])
        for rows, threads in itertools.product((*ROWS, MANY_ROWS), (2, 5)):
            torch.set_num_threads(threads)
            assert torch.equal(linear(x[:rows]), alone[:rows]), (rows, threads)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_own_row_only(instruction_set, broken, generator):
    kernels = NativeKernels(torch.bfloat16)
    for activations in (None, torch.int8):
        linear = kernels.linear(random_quantised(40, 256, generator, activations=activations))
        x = torch.randn(5, 256, generator=generator).bfloat16()
        whole = linear(x)
        x[2, 200] = broken
        result = linear(x)
        assert result[2].isnan().all()
        kept = [0, 1, 3, 4]
        assert torch.equal(result[kept], whole[kept])


def test_rows_of_zeros_and_of_the_smallest_numbers_are_zero(instruction_set, generator):
    linear = NativeKernels(torch.float32).linear(random_quantised(40, 256, generator, zeros=True))
    x = torch.zeros(3, 256)
    x[1] = 1e-40
    assert not linear(x).any()


def test_no_rows_are_nothing_to_do(instruction_set, generator):
    kernels = NativeKernels(torch.float32)
    assert kernels.linear(random_quantised(20, 32, generator))(torch.ones(0, 32)).shape == (0, 20)


def test_floats_of_8_bits_are_expanded_once(instruction_set, generator):
    weight = random_quantised(48, 64, generator, bits=8, group_size=32)
    floats = (weight.values.float() / 16).to(torch.float8_e4m3fn)
    weight = type(weight)(floats, weight.scales, None, 8, 32, torch.float8_e4m3fn)
    kernels = NativeKernels(torch.bfloat16)
    linear = kernels.linear(weight)
    assert kernels.saved_bytes < 0
    x = torch.randn(3, 64, generator=generator).bfloat16()
    expected = functional.linear(x.double(), weight.dequantise(torch.bfloat16).double())
    assert torch.allclose(linear(x).double(), expected, rtol=2**-8, atol=2**-8)


def test_odd_groups_in_an_order_of_their_own_are_left_to_torch(instruction_set, generator):
    weight = random_quantised(48, 60, generator, group_size=12, ordered=True)
    x = torch.randn(3, 60, generator=generator)
    expected = QuantisedLinear(weight)(x)
    assert torch.equal(NativeKernels(torch.float32).linear(weight)(x), expected)
    gated = NativeKernels(torch.float32).gated_linear(weight, None, "silu")(x)
    assert torch.allclose(gated, functional.silu(expected[:, :24]) * expected[:, 24:], rtol=1e-5, atol=1e-6)
