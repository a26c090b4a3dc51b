"""AWQ: inputs that carry much are scaled up in the weight and down in what stands before it (arXiv:2306.00978).

    norm ──/s──▶ qkv * s      norm ──/s──▶ gate_up * s      up rows ──/s──▶ down * s      v rows ──/s──▶ output * s

The function stays the same; what changes is how much of the rounding falls on which input. The scales are powers of the
inputs' mean magnitude; the power is the one of a grid with which the squared error of the weight's outputs is least.
What has no such predecessor is left as it is: qkv of models that normalise after their blocks, and the first weights of
experts, whose input the router reads too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ...actors.weights import LayerWeights, MLPWeights
from ...cluster.model_spec import ModelSpec
from .rounding import Grid, RoundedWeight, round_to_nearest
from .scale_search import search_scales
from .statistics import InputStatistics

POWERS = tuple(step / 20 for step in range(20))
"""Powers of the mean magnitude that are tried; 0 leaves a weight as it is."""


def round_with_searched_scales(weight: Tensor, products: Tensor, grid: Grid) -> RoundedWeight:
    """The clip search that follows the scaling: see `search_scales`."""
    return grid.round(weight, *search_scales(weight, products, grid))


@dataclasses.dataclass(frozen=True, slots=True)
class InputScaling:
    """Moves scales between a layer's weights, in place, and adapts the statistics to it."""

    spec: ModelSpec
    grid: Grid
    stored: torch.dtype
    """The checkpoint's, of norms and biases."""
    statistics_of: Callable[[Tensor], InputStatistics]

    def scale_layer(self, layer: LayerWeights) -> None:
        """Scale all weights of a layer that have something before them to take the inverse."""
        assert isinstance(layer.qkv, Tensor)
        assert isinstance(layer.output, Tensor)
        self._scale_behind_norm(layer.input_norm, layer.qkv)
        self._scale_output(layer, layer.qkv, layer.output)
        mlp = layer.mlp
        if isinstance(mlp, MLPWeights):
            assert isinstance(mlp.gate_up, Tensor)
            self._scale_behind_norm(layer.mlp_input_norm, mlp.gate_up)
            self._scale_down(mlp)
            return
        for gate_up, down in zip(mlp.gate_up, mlp.down, strict=True):
            self._scale_down(MLPWeights(gate_up, down))
        if mlp.shared is not None:
            self._scale_down(mlp.shared)

    def _scale_behind_norm(self, norm: Tensor | None, weight: Tensor) -> None:
        """`norm` [in] float32 with the family's offset. The scales are those that its rounding to the checkpoint's
        dtype leaves, so that it takes exactly their inverse."""
        if norm is None:
            return
        scales = self._best_scales(weight, None)
        offset = self.spec.norm_offset
        stored = (norm / scales - offset).to(self.stored).float() + offset
        usable = (stored != 0) & (norm != 0)
        scales = torch.where(usable, norm / stored, 1.0)
        norm.copy_(torch.where(usable, stored, norm))
        self._scale_columns(weight, scales)

    def _scale_output(self, layer: LayerWeights, qkv: Tensor, output: Tensor) -> None:
        """Queries that share a value head have its channels' scales in common."""
        spec = self.spec
        channels = (spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_dim)
        scales = self._best_scales(output, channels)
        self._scale_columns(output, scales)
        of_values = scales.view(channels)[:, 0].flatten()
        qkv[-len(of_values) :] /= of_values[:, None]
        if layer.qkv_bias is not None:
            self._divide(layer.qkv_bias[-len(of_values) :], of_values)

    def _scale_down(self, mlp: MLPWeights) -> None:
        assert isinstance(mlp.gate_up, Tensor)
        assert isinstance(mlp.down, Tensor)
        scales = self._best_scales(mlp.down, None)
        self._scale_columns(mlp.down, scales)
        mlp.gate_up[len(scales) :] /= scales[:, None]
        if mlp.gate_up_bias is not None:
            self._divide(mlp.gate_up_bias[len(scales) :], scales)

    def _divide(self, bias: Tensor, scales: Tensor) -> None:
        bias.copy_((bias / scales).to(self.stored))

    def _scale_columns(self, weight: Tensor, scales: Tensor) -> None:
        weight *= scales
        self.statistics_of(weight).divide_inputs(scales)

    def _best_scales(self, weight: Tensor, shared: tuple[int, int, int] | None) -> Tensor:
        """[in]: what to multiply the weight's columns with.

        Args:
            shared: (kv heads, queries of each, channels): scales are the same for all queries of a kv head.
        """
        statistics = self.statistics_of(weight)
        magnitudes = statistics.magnitudes
        best, least = torch.ones_like(magnitudes), float("inf")
        if not statistics.suffices or not magnitudes.any():
            return best
        if shared is not None:
            magnitudes = magnitudes.view(shared).mean(1, keepdim=True).expand(shared).flatten()
        magnitudes = (magnitudes / magnitudes.mean()).clamp_min(1e-4)
        for power in POWERS:
            scales = magnitudes.pow(power)
            scales = scales / (scales.max() * scales.min()).sqrt()
            rounded = round_to_nearest(weight * scales, self.grid).dequantise() / scales
            error = statistics.squared_output(weight - rounded)
            if error < least:
                best, least = scales, error
        return best
