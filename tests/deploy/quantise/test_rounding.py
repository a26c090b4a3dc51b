"""Rounded weights are as near as the method promises, and are packed as compressed-tensors reads them."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from raytroupe.deploy.quantise import compressed_tensors
from raytroupe.deploy.quantise.compressed_tensors import module_tensors, pack_bits
from raytroupe.deploy.quantise.gptq import round_with_compensation
from raytroupe.deploy.quantise.options import CHANNEL
from raytroupe.deploy.quantise.rounding import Grid, round_to_nearest
from raytroupe.deploy.quantise.scale_search import search_scales
from raytroupe.deploy.quantise.statistics import InputStatistics


def grid(bits: int = 4, group_size: int = 32, symmetric: bool = True) -> Grid:
    return Grid(bits, group_size, symmetric, torch.bfloat16)


def correlated_inputs(inputs: int) -> InputStatistics:
    """Inputs of which a few carry most, and that move together."""
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(600, 8, generator=generator) @ torch.randn(8, inputs, generator=generator)
    statistics = InputStatistics(inputs)
    statistics.note((factors + torch.randn(600, inputs, generator=generator)) * torch.linspace(0.1, 3, inputs))
    return statistics


def random_weight(out: int = 24, inputs: int = 96) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("columns", [1, 31, 32, 40, 96])
def test_integers_are_packed_as_the_library_packs_them(
    bits: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed_tensors, "PACKED_AT_ONCE", 70)  # a row or a few
    integers = torch.randint(0, 1 << bits, (5, columns), dtype=torch.uint8)
    signed = (integers.int() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack_bits(integers, bits), pack_to_int32(signed, bits))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [32, CHANNEL])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_library_reads_the_numbers_that_were_meant(bits: int, group_size: int, symmetric: bool) -> None:
    rounded = round_to_nearest(random_weight(), Grid(bits, group_size, symmetric, torch.float32))
    tensors = {name.removeprefix("m."): tensor for name, tensor in module_tensors("m", rounded, packed=True).items()}
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, group_size=group_size)
    dense = PackedQuantizationCompressor.decompress(tensors, QuantizationScheme(targets=["Linear"], weights=arguments))
    torch.testing.assert_close(dense["weight"], rounded.dequantise(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rounding_to_nearest_errs_by_half_a_step(bits: int, symmetric: bool) -> None:
    weight = random_weight()
    if not symmetric:
        weight += 1.5
    rounded = round_to_nearest(weight, Grid(bits, 32, symmetric, torch.float32))
    error = rounded.grid.grouped((weight - rounded.dequantise()).abs())
    # The zero point of an asymmetric range is rounded as well, so its ends may lie half a step further out.
    assert bool((error <= rounded.scales[..., None] * (0.5001 if symmetric else 1.0001)).all())
    assert rounded.integers.max() <= (1 << bits) - 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(symmetric: bool) -> None:
    weight = random_weight()
    weight[3] = 0
    assert not round_to_nearest(weight, grid(symmetric=symmetric)).dequantise()[3].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, CHANNEL])
@pytest.mark.parametrize("bits", [3, 4])
def test_each_search_brings_the_outputs_nearer(bits: int, group_size: int, symmetric: bool) -> None:
    weight, statistics = random_weight(), correlated_inputs(96)
    of = grid(bits, group_size, symmetric)
    nearest = statistics.relative_error(weight, round_to_nearest(weight, of).dequantise())
    scales, zeros = search_scales(weight, statistics.products, of)
    searched = statistics.relative_error(weight, of.round(weight, scales, zeros).dequantise())
    compensated = statistics.relative_error(
        weight, round_with_compensation(weight, statistics.products, of).dequantise()
    )
    assert compensated < 0.7 * searched < 0.7 * nearest


def test_compensation_has_nothing_to_do_with_independent_inputs() -> None:
    weight, of = random_weight(), grid()
    products = torch.diag(torch.linspace(0.5, 2, 96))
    expected = of.round(weight, *search_scales(weight, products, of))
    assert torch.equal(round_with_compensation(weight, products, of).integers, expected.integers)


def test_compensation_takes_two_squares_beside_the_products() -> None:
    products = correlated_inputs(640).products
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        round_with_compensation(random_weight(4, 640), products, grid())
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    assert 1.9 < max(held) / products.nbytes < 2.2


def test_inputs_that_were_never_seen_do_no_harm() -> None:
    weight, statistics = random_weight(), correlated_inputs(96)
    statistics.products[:, 5] = 0
    statistics.products[5] = 0
    rounded = round_with_compensation(weight, statistics.products, grid())
    step = rounded.scales[:, 0]
    assert bool(((weight[:, 5] - rounded.dequantise()[:, 5]).abs() <= 8 * step).all())
    assert statistics.relative_error(weight, rounded.dequantise()) < 0.1


def test_statistics_know_the_error_of_the_outputs() -> None:
    inputs, weight = torch.randn(50, 96), random_weight()
    other = weight + 0.1 * torch.randn_like(weight)
    statistics = InputStatistics(96)
    statistics.note(inputs[:20])
    statistics.note(inputs[20:])
    outputs = inputs @ weight.T
    expected = ((inputs @ other.T - outputs).norm() / outputs.norm()).item()
    assert statistics.relative_error(weight, other) == pytest.approx(expected, rel=1e-3)
