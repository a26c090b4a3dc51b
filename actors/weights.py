"""Loading a shard's weights: only its slices are read, straight into fused tensors of the final dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..cluster.families import NormPlacement
from ..cluster.model_spec import ModelSpec
from ..cluster.topology import ShardLayout
from .checkpoint import Checkpoint
from .dummy_weights import fill_randomly
from .weight_names import TensorSlice, WeightNames
from .weight_reader import plan_reads, read_weights


@dataclasses.dataclass(slots=True)
class MLPWeights:
    """A gated MLP. gate_up: [2 * width, hidden], gate first; down: [hidden, width]."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclasses.dataclass(slots=True)
class MoEWeights:
    """A mixture of experts."""

    router: Tensor
    """[experts, hidden]."""
    gate_up: Tensor
    """[experts, 2 * width, hidden], gate first."""
    down: Tensor
    """[experts, hidden, width]."""
    shared: MLPWeights | None = None
    shared_gate: Tensor | None = None
    """[1, hidden]."""


@dataclasses.dataclass(slots=True)
class LayerWeights:
    """One decoder layer. Norms are [hidden] float32 with the family's offset added; None where the family has none."""

    qkv: Tensor
    """[(heads + 2 * kv_heads) * head_dim, hidden]."""
    qkv_bias: Tensor | None
    output: Tensor
    """[hidden, heads * head_dim]."""
    output_bias: Tensor | None
    mlp: MLPWeights | MoEWeights
    query_norm: Tensor | None = None
    """float32: [head_dim], or this shard's part of the full width."""
    key_norm: Tensor | None = None
    input_norm: Tensor | None = None
    attention_output_norm: Tensor | None = None
    mlp_input_norm: Tensor | None = None
    mlp_output_norm: Tensor | None = None


@dataclasses.dataclass(slots=True)
class Weights:
    """The weights of one shard."""

    layers: list[LayerWeights]
    embedding: Tensor | None = None
    """[padded vocabulary share, hidden], on the first stage."""
    final_norm: Tensor | None = None
    head: Tensor | None = None
    """[padded vocabulary share, hidden], on the last stage; the embedding itself where both are tied and here."""


def load_weights(
    folder: Path,
    spec: ModelSpec,
    layout: ShardLayout,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    *,
    load_format: str = "auto",
) -> Weights:
    """Read this shard's slice of a checkpoint; it is on the device on return.

    Args:
        progress: called with (bytes done, bytes in all), as they will lie in memory, whenever a part has been read.
        load_format: "auto", or "dummy" for random weights; then nothing is read and `progress` is not called.

    Raises:
        CheckpointError: names the file or the tensor that is missing, damaged or of the wrong shape.
    """
    if load_format == "dummy":
        return dummy_weights(spec, layout, dtype, device)
    checkpoint, naming = Checkpoint(folder), spec.naming
    prefix = next((p for p in naming.prefixes if f"{p}embed_tokens.weight" in checkpoint), naming.prefixes[0])
    head = next((name for name in naming.heads if name in checkpoint), naming.heads[0])
    allocator = _Allocator(spec, layout, WeightNames(spec, layout, prefix, head), dtype, device)
    weights = allocator.weights()
    places = [place for target, slices, _ in allocator.pending for place in _stack(target, slices)]
    total = sum(target.nbytes for target, _, _ in allocator.pending)
    done = total - sum(place.nbytes for _, place in places)  # padding is there already

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    read_weights(plan_reads(places, checkpoint), device, advance)
    for target, _, offset in allocator.pending:
        if offset:
            target += offset
    return weights


def dummy_weights(spec: ModelSpec, layout: ShardLayout, dtype: torch.dtype, device: torch.device) -> Weights:
    """Random weights of this shard's shapes, made on the device (`actors/dummy_weights.py`)."""
    names = WeightNames(spec, layout, spec.naming.prefixes[0], spec.naming.heads[0])
    allocator = _Allocator(spec, layout, names, dtype, device)
    weights = allocator.weights()
    for target, slices, _ in allocator.pending:
        fill_randomly(target, slices)
    return weights


def _stack(target: Tensor, slices: list[TensorSlice]) -> Iterator[tuple[TensorSlice, Tensor]]:
    """Every slice and its rows of `target`, one below the other; those that are left (padding of the vocabulary) become
    zero."""
    start = 0
    for piece in slices:
        yield piece, target[start : start + piece.num_rows]
        start += piece.num_rows
    target[start:].zero_()


class _Allocator:
    """Lays out a shard's weights. Memory is reserved here and filled later, tensor by tensor, from `pending`."""

    def __init__(
        self, spec: ModelSpec, layout: ShardLayout, names: WeightNames, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.pending: list[tuple[Tensor, list[TensorSlice], float]] = []
        """(tensor, what to stack in it, what to add to it)."""
        self._spec, self._layout, self._names = spec, layout, names
        self._dtype, self._device = dtype, device

    def weights(self) -> Weights:
        """Everything this shard holds."""
        spec, layout, names = self._spec, self._layout, self._names
        weights = Weights(layers=[])
        if layout.first_stage:
            weights.embedding = self._vocabulary(names.embedding())
        weights.layers = [self._layer(index) for index in layout.layers(spec)]
        if layout.last_stage:
            weights.final_norm = self._norm(names.final_norm())
            tied_here = spec.tie_word_embeddings and layout.first_stage
            weights.head = weights.embedding if tied_here else self._vocabulary(names.head())
        return weights

    def _layer(self, index: int) -> LayerWeights:
        spec, names, naming = self._spec, self._names, self._spec.naming
        layer = LayerWeights(
            qkv=self._matrix(names.qkv(index, "weight")),
            qkv_bias=self._vector(names.qkv(index, "bias")),
            output=self._matrix(names.attention_output(index, "weight")),
            output_bias=self._vector(names.attention_output(index, "bias")),
            mlp=self._moe(index) if spec.layers[index].sparse else self._mlp(index),
            query_norm=self._optional_norm(names.query_norm(index)),
            key_norm=self._optional_norm(names.key_norm(index)),
        )
        if spec.norm_placement is not NormPlacement.POST:
            layer.input_norm = self._norm(names.norm(index, naming.input_norm))
            layer.mlp_input_norm = self._norm(names.norm(index, naming.mlp_input_norm))
        if spec.norm_placement is not NormPlacement.PRE:
            layer.attention_output_norm = self._norm(names.norm(index, naming.attention_output_norm))
            layer.mlp_output_norm = self._norm(names.norm(index, naming.mlp_output_norm))
        return layer

    def _mlp(self, index: int) -> MLPWeights:
        names = self._names
        return MLPWeights(
            gate_up=self._matrix(names.gate_up(index, "weight")),
            down=self._matrix(names.down(index, "weight")),
            gate_up_bias=self._vector(names.gate_up(index, "bias")),
            down_bias=self._vector(names.down(index, "bias")),
        )

    def _moe(self, index: int) -> MoEWeights:
        names, moe = self._names, self._spec.moe
        assert moe is not None
        weights = MoEWeights(
            router=self._matrix(names.router(index)),
            gate_up=self._matrix(names.experts_gate_up(index)).unflatten(0, (moe.num_experts, -1)),
            down=self._matrix(names.experts_down(index)).unflatten(0, (moe.num_experts, -1)),
        )
        if moe.shared_intermediate_size:
            weights.shared = MLPWeights(
                gate_up=self._matrix(names.shared_gate_up(index)), down=self._matrix(names.shared_down(index))
            )
            weights.shared_gate = self._matrix(names.shared_gate(index))
        return weights

    def _matrix(self, slices: list[TensorSlice]) -> Tensor:
        rows = sum(piece.num_rows for piece in slices)
        return self._reserve((rows, slices[0].num_columns or 1), self._dtype, slices)

    def _vocabulary(self, slices: list[TensorSlice]) -> Tensor:
        shape = (self._layout.padded_vocab_share(self._spec), self._spec.hidden_size)
        return self._reserve(shape, self._dtype, slices)

    def _vector(self, slices: list[TensorSlice]) -> Tensor | None:
        if not slices:
            return None
        return self._reserve((sum(piece.num_rows for piece in slices),), self._dtype, slices)

    def _norm(self, slices: list[TensorSlice]) -> Tensor:
        return self._reserve((slices[0].num_rows,), torch.float32, slices, self._spec.norm_offset)

    def _optional_norm(self, slices: list[TensorSlice]) -> Tensor | None:
        return self._norm(slices) if slices else None

    def _reserve(
        self, shape: tuple[int, ...], dtype: torch.dtype, slices: list[TensorSlice], offset: float = 0.0
    ) -> Tensor:
        target = torch.empty(shape, dtype=dtype, device=self._device)
        self.pending.append((target, slices, offset))
        return target
