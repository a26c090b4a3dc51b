"""Norms and biases of a layer, which scaling changes, as tensors of the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from ...actors.weight_names import WeightNames
from ...actors.weights import LayerWeights
from ...cluster.model_spec import ModelSpec


def vectors(layer: LayerWeights) -> dict[str, Tensor]:
    """Copies of the norms and biases that scaling may change."""
    found = {
        "input_norm": layer.input_norm,
        "mlp_input_norm": layer.mlp_input_norm,
        "qkv_bias": layer.qkv_bias,
        "gate_up_bias": getattr(layer.mlp, "gate_up_bias", None),
    }
    return {name: vector.clone() for name, vector in found.items() if vector is not None}


def changed_vectors(
    layer: LayerWeights, before: dict[str, Tensor], names: WeightNames, spec: ModelSpec, index: int
) -> dict[str, Tensor]:
    """Those of layer `index` that differ from `before`, by their names in the checkpoint and in its dtype."""
    slices = {
        "input_norm": names.norm(index, spec.naming.input_norm),
        "mlp_input_norm": names.norm(index, spec.naming.mlp_input_norm),
        "qkv_bias": names.qkv(index, "bias"),
        "gate_up_bias": names.gate_up(index, "bias"),
    }
    tensors: dict[str, list[Tensor]] = {}
    for name, vector in vectors(layer).items():
        if torch.equal(vector, before[name]):
            continue
        stored = vector - spec.norm_offset if name.endswith("norm") else vector
        for piece, part in zip(slices[name], stored.split([p.num_rows for p in slices[name]]), strict=True):
            tensors.setdefault(piece.name, []).append(part.to(getattr(torch, spec.dtype)))
    return {name: torch.cat(parts) for name, parts in tensors.items()}
