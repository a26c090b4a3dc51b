"""Moving scales between weights leaves every family's layers as they are, and helps the rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from dense_copy import random_tokens
from tiny_models import make_tiny_model

from raytroupe.actors.collectives import SingleShard
from raytroupe.actors.decoder import Decoder
from raytroupe.actors.kv_cache import KVCache
from raytroupe.actors.weights import LayerWeights, Weights
from raytroupe.cluster.model_spec import ModelSpec, load_spec
from raytroupe.deploy.quantise.awq import InputScaling, round_with_searched_scales
from raytroupe.deploy.quantise.hidden_states import BLOCK_SIZE, Batches
from raytroupe.deploy.quantise.one_layer import CPU, OneLayer, Target, load_layer, targets, weight_names
from raytroupe.deploy.quantise.options import CHANNEL
from raytroupe.deploy.quantise.rounding import Grid, round_to_nearest
from raytroupe.deploy.quantise.statistics import CalibrationKernels

FAMILIES = ("llama3", "gemma2", "olmo2", "phi3", "mixtral", "qwen2_moe")
"""Biases and fused matrices, a norm's offset, no norm before, experts, a shared expert."""
SEQUENCES = random_tokens(12, 40, 131)


@dataclasses.dataclass
class ObservedLayer:
    """One layer of a tiny model that has seen random hidden states."""

    spec: ModelSpec
    layer: LayerWeights
    targets: list[Target]
    kernels: CalibrationKernels
    decoder: Decoder
    inputs: torch.Tensor

    def run(self) -> torch.Tensor:
        """The hidden states behind the layer."""
        batches = Batches([len(tokens) for tokens in SEQUENCES])
        cache = KVCache(self.spec, OneLayer(layer=0), batches.num_blocks, BLOCK_SIZE, torch.float32, CPU)
        parts = [
            self.decoder.forward(None, self.inputs[rows].clone(), metadata, cache).clone() for rows, metadata in batches
        ]
        return torch.cat(parts)


def observed_layer(family: str, folder: Path) -> ObservedLayer:
    make_tiny_model(family, folder)
    spec = load_spec(folder)
    layer = load_layer(folder, spec, 0)
    found = targets(layer, weight_names(folder, spec), spec, 0)
    kernels = CalibrationKernels([target.weight for target in found])
    decoder = Decoder(spec, OneLayer(layer=0), Weights(layers=[layer]), kernels, SingleShard(), 512, torch.float32, CPU)
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(sum(map(len, SEQUENCES)), spec.hidden_size, generator=generator)
    # Some inputs carry most, and they do not lie together.
    inputs *= torch.logspace(-1.5, 1, spec.hidden_size)[torch.randperm(spec.hidden_size, generator=generator)]
    observed = ObservedLayer(spec, layer, found, kernels, decoder, inputs)
    kernels.observing = True
    observed.run()
    kernels.observing = False
    return observed


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_leaves_the_function_as_it_is(family: str, tmp_path: Path) -> None:
    observed = observed_layer(family, tmp_path)
    before = observed.run()
    weights = [target.weight.clone() for target in observed.targets]
    # Norms are stored in bfloat16; the scales take that rounding up. Biases are rounded for real, so not here.
    stored = torch.float32 if observed.spec.qkv_bias else torch.bfloat16
    grid = Grid(4, 4, True, torch.bfloat16)
    InputScaling(observed.spec, grid, stored, observed.kernels.of).scale_layer(observed.layer)
    changed = [not torch.equal(a, target.weight) for a, target in zip(weights, observed.targets, strict=True)]
    assert sum(changed) >= len(changed) // 2, "scales were found"
    torch.testing.assert_close(observed.run(), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_follow_the_scaled_inputs(family: str, tmp_path: Path) -> None:
    observed = observed_layer(family, tmp_path)
    grid = Grid(4, 4, True, torch.float32)
    InputScaling(observed.spec, grid, torch.float32, observed.kernels.of).scale_layer(observed.layer)
    adapted = [observed.kernels.of(target.weight) for target in observed.targets]
    fresh = CalibrationKernels([target.weight for target in observed.targets])
    observed.kernels.statistics = fresh.statistics
    observed.kernels.observing = True
    observed.run()
    for target, expected in zip(observed.targets, adapted, strict=True):
        statistics = observed.kernels.of(target.weight)
        assert statistics.rows == expected.rows
        peak = statistics.products.abs().max().item()
        torch.testing.assert_close(expected.products, statistics.products, rtol=1e-3, atol=1e-4 * peak)


def test_scaling_brings_the_outputs_nearer(tmp_path: Path) -> None:
    observed = observed_layer("llama3", tmp_path)
    grid = Grid(4, CHANNEL, True, torch.float32)

    def errors(rounding) -> list[float]:
        found = []
        for target in observed.targets:
            statistics = observed.kernels.of(target.weight)
            found.append(statistics.relative_error(target.weight, rounding(target.weight, statistics).dequantise()))
        return found

    nearest = errors(lambda weight, statistics: round_to_nearest(weight, grid))
    InputScaling(observed.spec, grid, torch.float32, observed.kernels.of).scale_layer(observed.layer)
    scaled = errors(lambda weight, statistics: round_to_nearest(weight, grid))
    clipped = errors(lambda weight, statistics: round_with_searched_scales(weight, statistics.products, grid))
    assert scaled[0] < 0.9 * nearest[0], "qkv, whose inputs differ in size"
    assert sum(clipped) < 0.95 * sum(scaled) < 0.95 * sum(nearest)
