import pytest
import torch
from quantised_samples import random_weight

from raytroupe.kernels.activation import gated_activation
from raytroupe.kernels.gpu.eight_bit_linear import EightBitConfig, EightBitProduct, can_multiply, candidates
from raytroupe.kernels.gpu.quantised_activations import round_activations
from raytroupe.kernels.gpu.quantised_operations import TritonQuantisedLinear
from raytroupe.kernels.quantised_linear import QuantisedLinear
from raytroupe.kernels.quantised_weight import quantise_activations

FORMATS = [torch.int8, torch.float8_e4m3fn]


def weight_of(generator, outputs, inputs, dtype, group=1000):
    return random_weight(
        generator, outputs, inputs, bits=8, group=group, floats=dtype.is_floating_point, activations=dtype
    )


def configs(split=1):
    return {rows: EightBitConfig(block_n=32, split_k=split, warps=4, stages=2) for rows in (16, 32, 64, 128)}


def linear_of(weight, bias=None, split=1, activation=None):
    return TritonQuantisedLinear(EightBitProduct(weight, bias, activation, configs(split)))


@pytest.mark.launches("round_activations_kernel")
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("inputs", "group"), [(64, 64), (70, 70), (200, 64), (96, 32)])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_rounded_activations_are_the_reference_bit_for_bit(dtype, inputs, group, source, generator):
    x = torch.randn(5, inputs + 3, generator=generator).to(source)[:, 2 : inputs + 2]
    x[1] = 0.0
    x[2, 3], x[3, 4] = torch.nan, -torch.inf
    x[4] *= torch.logspace(-6, 0, inputs)  # small ones, of which float8 keeps few bits
    expected, expected_scales = quantise_activations(x, dtype, group)
    got, scales = round_activations(x, dtype, group)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.float(), expected.float())
    order = torch.randperm(inputs, generator=generator)
    got, _ = round_activations(x[:2], dtype, group, order=order)
    assert torch.equal(got.float(), quantise_activations(x[:2, order], dtype, group)[0].float())
    expanded, _ = round_activations(x[:2], dtype, group, expanded=True)
    wide = expected_scales[:2].repeat_interleave(group, 1)[:, :inputs] * expected[:2].float()
    assert torch.equal(expanded, wide.to(source))


@pytest.mark.launches("round_activations_kernel")
def test_every_float8_and_the_ties_between_them_round_as_the_format_says():
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = exact[~exact.isnan()].sort().values
    between = (exact[:-1] + exact[1:]) / 2
    x = torch.cat((exact, between, between.nextafter(exact[1:]), torch.tensor([448.0])))[None]
    got, scales = round_activations(x, torch.float8_e4m3fn, x.shape[1])
    assert scales.item() == 1.0
    assert torch.equal(got.float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.launches("eight_bit_linear_kernel")
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("inputs", "group"), [(256, 1000), (200, 1000), (256, 128), (160, 32)])
@pytest.mark.parametrize(("rows", "split"), [(1, 2), (20, 1)])
def test_product_is_the_reference(dtype, inputs, group, rows, split, generator):
    weight = weight_of(generator, 40, inputs, dtype, group)
    assert can_multiply(weight, float8=True)
    bias = torch.randn(40, generator=generator)
    x = torch.randn(rows, inputs, generator=generator)
    # Both sides multiply the same rounded numbers; what differs is the order of float32 sums.
    for given in (None, bias):
        y = linear_of(weight, given, split)(x)
        torch.testing.assert_close(y, QuantisedLinear(weight, given)(x), rtol=2e-5, atol=2e-5)


@pytest.mark.launches("eight_bit_linear_kernel")
@pytest.mark.parametrize("dtype", FORMATS)
def test_many_rows_are_tiles_of_their_own_in_every_order(dtype, generator):
    weight = weight_of(generator, 40, 64, dtype)
    for rows in (40, 150):
        x = torch.randn(rows, 64, generator=generator)
        torch.testing.assert_close(linear_of(weight)(x), QuantisedLinear(weight)(x), rtol=2e-5, atol=2e-5)


@pytest.mark.launches("eight_bit_linear_kernel")
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("group", [1000, 64])
def test_gated_product_is_the_reference(split, group, generator):
    weight = weight_of(generator, 2 * 24, 256, torch.int8, group)
    x, bias = torch.randn(3, 256, generator=generator), torch.randn(48, generator=generator)
    expected = gated_activation(QuantisedLinear(weight, bias)(x), "gelu")
    got = linear_of(weight, bias, split, "gelu")(x)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.launches("eight_bit_linear_kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_product_is_added_and_float32(dtype, generator):
    weight = weight_of(generator, 50, 128, torch.int8)
    x = torch.randn(4, 128, generator=generator).to(dtype)
    wide = QuantisedLinear(weight).float32(x)
    linear = linear_of(weight, split=2)
    torch.testing.assert_close(linear.float32(x), wide, rtol=2e-5, atol=2e-5)
    whole = torch.randn(4, 60, generator=generator).to(dtype)
    before, hidden = whole.clone(), whole[:, 6:56]
    expected = hidden.float() + 0.5 * wide
    linear.add_to(hidden, x, 0.5)
    step = 2e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(hidden.float(), expected, rtol=step, atol=step)
    assert torch.equal(whole[:, :6], before[:, :6])


@pytest.mark.launches("eight_bit_linear_kernel")
def test_a_broken_row_does_not_touch_the_others(generator):
    weight = weight_of(generator, 20, 128, torch.int8)
    x = torch.randn(4, 128, generator=generator)
    linear = linear_of(weight)
    expected = linear(x)
    x[1, 5], x[3, 0] = torch.nan, torch.inf
    y = linear(x)
    assert torch.equal(y[::2], expected[::2])
    assert y[1::2].isnan().all()


@pytest.mark.launches("eight_bit_linear_kernel")
def test_order_of_columns_and_configurations_of_the_table(generator):
    weight = random_weight(generator, 24, 128, bits=8, group=1000, activations=torch.int8, ordered=True)
    x = torch.randn(3, 128, generator=generator)
    linear = TritonQuantisedLinear(EightBitProduct(weight, None, None))
    torch.testing.assert_close(linear(x), QuantisedLinear(weight)(x), rtol=2e-5, atol=2e-5)


def test_what_the_kernel_cannot_multiply_is_known(generator):
    assert not can_multiply(random_weight(generator, 8, 64, bits=8), float8=True)
    assert not can_multiply(random_weight(generator, 8, 64, bits=4, activations=torch.int8), float8=True)
    assert not can_multiply(random_weight(generator, 8, 64, bits=8, zeros=True, activations=torch.int8), float8=True)
    assert not can_multiply(weight_of(generator, 8, 64, torch.float8_e4m3fn), float8=False)
    assert not can_multiply(weight_of(generator, 8, 64, torch.int8, group=16), float8=True)
    assert can_multiply(weight_of(generator, 8, 60, torch.int8), float8=True)


@pytest.mark.launches("eight_bit_linear_kernel")
@pytest.mark.parametrize("gated", [False, True])
def test_every_candidate_computes_the_product(gated, generator):
    weight = weight_of(generator, 64, 512, torch.int8)
    x = torch.randn(1, 512, generator=generator)
    expected = QuantisedLinear(weight)(x)
    expected = gated_activation(expected, "silu") if gated else expected
    found = candidates(16, 32 if gated else 64, 512, gated=gated, processors=2)
    assert len(set(found)) == len(found) > 2
    for candidate in found:
        product = EightBitProduct(weight, None, "silu" if gated else None, {16: candidate})
        torch.testing.assert_close(TritonQuantisedLinear(product)(x), expected, rtol=2e-5, atol=2e-5)
