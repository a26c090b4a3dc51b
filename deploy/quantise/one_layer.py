"""A model one layer at a time: a decoder of a single layer, and the weights in it that are to be quantised."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from ...actors.checkpoint import Checkpoint
from ...actors.weight_names import TensorSlice, WeightNames
from ...actors.weights import LayerWeights, MLPWeights, load_weights
from ...cluster.model_spec import ModelSpec
from ...cluster.topology import ShardLayout

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class OneLayer(ShardLayout):
    """A stage of one layer without embedding and output projection."""

    layer: int = 0

    @property
    def first_stage(self) -> bool:
        return False

    @property
    def last_stage(self) -> bool:
        return False

    def layers(self, spec: ModelSpec) -> range:
        return range(self.layer, self.layer + 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A weight to be quantised: checkpoint tensors of the same input, stacked."""

    kind: str
    """For the summary."""
    weight: Tensor
    """[out, in] float32; shares memory with the layer's weights."""
    slices: list[TensorSlice]

    def modules(self) -> dict[str, tuple[int, int]]:
        """First row and the one after the last, by module of the checkpoint. A matrix that the checkpoint has fused
        already is one module."""
        rows: dict[str, tuple[int, int]] = {}
        start = 0
        for piece in self.slices:
            module = piece.name.removesuffix(".weight")
            first, _ = rows.get(module, (start, start))
            start += piece.num_rows
            rows[module] = (first, start)
        return rows


def weight_names(folder: Path, spec: ModelSpec) -> WeightNames:
    """Names of the whole model's tensors in this checkpoint."""
    checkpoint, naming = Checkpoint(folder), spec.naming
    prefix = next((p for p in naming.prefixes if f"{p}embed_tokens.weight" in checkpoint), naming.prefixes[0])
    head = next((name for name in naming.heads if name in checkpoint), naming.heads[0])
    return WeightNames(spec, ShardLayout(), prefix, head)


def load_layer(folder: Path, spec: ModelSpec, index: int) -> LayerWeights:
    """The weights of one layer in float32; nothing else is read."""
    return load_weights(folder, spec, OneLayer(layer=index), torch.float32, CPU).layers[0]


def slices_to_quantise(names: WeightNames, spec: ModelSpec, index: int) -> list[tuple[str, list[TensorSlice]]]:
    """Kind and checkpoint tensors of every weight of a layer that is quantised; routers and gates are not."""
    found = [
        ("qkv", names.qkv(index, "weight")),
        ("output", names.attention_output(index, "weight")),
    ]
    if not spec.layers[index].sparse or spec.moe is None:
        return [*found, ("gate_up", names.gate_up(index, "weight")), ("down", names.down(index, "weight"))]
    gate_up, down = names.experts_gate_up(index), names.experts_down(index)
    for expert in range(spec.moe.num_experts):
        found += [
            ("experts' gate_up", gate_up[2 * expert : 2 * expert + 2]),
            ("experts' down", down[expert : expert + 1]),
        ]
    if spec.moe.shared_intermediate_size:
        found += [
            ("shared gate_up", names.shared_gate_up(index)),
            ("shared down", names.shared_down(index)),
        ]
    return found


def targets(layer: LayerWeights, names: WeightNames, spec: ModelSpec, index: int) -> list[Target]:
    """The weights of a layer that are quantised, in the order of `slices_to_quantise`."""
    weights = [_dense(layer.qkv), _dense(layer.output)]
    mlp = layer.mlp
    if isinstance(mlp, MLPWeights):
        weights += [_dense(mlp.gate_up), _dense(mlp.down)]
    else:
        for gate_up, down in zip(mlp.gate_up, mlp.down, strict=True):
            weights += [_dense(gate_up), _dense(down)]
        if mlp.shared is not None:
            weights += [_dense(mlp.shared.gate_up), _dense(mlp.shared.down)]
    found = slices_to_quantise(names, spec, index)
    return [Target(kind, weight, slices) for (kind, slices), weight in zip(found, weights, strict=True)]


def _dense(weight: object) -> Tensor:
    assert isinstance(weight, Tensor), "a quantised source is refused before it is read"
    return weight
