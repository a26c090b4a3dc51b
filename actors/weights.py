"""Loading a shard's weights: only its slices are read, straight into fused tensors of the final dtype, or, where they
are quantised, packed into the form that kernels take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ..cluster.families import NormPlacement
from ..cluster.model_spec import ModelSpec
from ..cluster.topology import ShardLayout
from ..kernels.interface import ExpertWeights
from ..kernels.quantised_weight import QuantisedWeight, Weight
from .checkpoint import Checkpoint
from .dummy_weights import DummyQuantised, fill_randomly
from .quantised_reader import QuantisedReader, QuantisedSource
from .weight_names import TensorSlice, WeightNames
from .weight_reader import plan_reads, read_weights

UNREAD = torch.empty(0)
"""Stands for a weight until it has been read."""


@dataclasses.dataclass(slots=True)
class MLPWeights:
    """A gated MLP. gate_up: [2 * width, hidden], gate first; down: [hidden, width]."""

    gate_up: Weight = UNREAD
    down: Weight = UNREAD
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclasses.dataclass(slots=True)
class MoEWeights:
    """A mixture of experts."""

    router: Tensor = UNREAD
    """[experts, hidden]."""
    gate_up: ExpertWeights = UNREAD
    """[experts, 2 * width, hidden], gate first."""
    down: ExpertWeights = UNREAD
    """[experts, hidden, width]."""
    shared: MLPWeights | None = None
    shared_gate: Tensor | None = None
    """[1, hidden]."""


@dataclasses.dataclass(slots=True)
class LayerWeights:
    """One decoder layer. Norms are [hidden] float32 with the family's offset added; None where the family has none."""

    mlp: MLPWeights | MoEWeights
    qkv: Weight = UNREAD
    """[(heads + 2 * kv_heads) * head_dim, hidden]."""
    qkv_bias: Tensor | None = None
    output: Weight = UNREAD
    """[hidden, heads * head_dim]."""
    output_bias: Tensor | None = None
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
    head: Weight | None = None
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
        progress: called with (bytes done, bytes in all) whenever a part has been read; they count as they will lie in
            memory, or as they are stored where they are quantised.
        load_format: "auto", or "dummy" for random weights; then nothing is read and `progress` is not called.

    Raises:
        CheckpointError: names the file or the tensor that is missing, damaged or of the wrong shape.
    """
    if load_format == "dummy":
        return dummy_weights(spec, layout, dtype, device)
    checkpoint, naming = Checkpoint(folder), spec.naming
    prefix = next((p for p in naming.prefixes if f"{p}embed_tokens.weight" in checkpoint), naming.prefixes[0])
    head = next((name for name in naming.heads if checkpoint.holds_weight(name)), naming.heads[0])
    names = WeightNames(spec, layout, prefix, head)
    quantised = QuantisedReader(checkpoint, spec.quantisation, dtype, device)
    allocator = _Allocator(spec, layout, names, dtype, device, quantised)
    weights = allocator.weights()
    places = [place for target, slices, _ in allocator.pending for place in _stack(target, slices)]
    whole = sum(target.nbytes for target, _, _ in allocator.pending)
    total = whole + quantised.nbytes
    done = whole - sum(place.nbytes for _, place in places)  # padding is there already

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    read_weights(plan_reads(places, checkpoint), device, advance)
    quantised.read(advance)
    for target, _, offset in allocator.pending:
        if offset:
            target += offset
    return weights


def dummy_weights(spec: ModelSpec, layout: ShardLayout, dtype: torch.dtype, device: torch.device) -> Weights:
    """Random weights of this shard's shapes, made on the device (`actors/dummy_weights.py`)."""
    names = WeightNames(spec, layout, spec.naming.prefixes[0], spec.naming.heads[0])
    allocator = _Allocator(spec, layout, names, dtype, device, DummyQuantised(spec.quantisation, dtype, device))
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
    """Lays out a shard's weights. Memory is reserved here and filled later, tensor by tensor, from `pending`; quantised
    weights are left to their source."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: ShardLayout,
        names: WeightNames,
        dtype: torch.dtype,
        device: torch.device,
        quantised: QuantisedSource,
    ) -> None:
        self.pending: list[tuple[Tensor, list[TensorSlice], float]] = []
        """(tensor, what to stack in it, what to add to it)."""
        self._spec, self._layout, self._names = spec, layout, names
        self._dtype, self._device = dtype, device
        self._quantised = quantised

    def weights(self) -> Weights:
        """Everything this shard holds."""
        spec, layout, names = self._spec, self._layout, self._names
        weights = Weights(layers=[])
        if layout.first_stage:
            weights.embedding = self._vocabulary(names.embedding())
        weights.layers = [self._layer(index) for index in layout.layers(spec)]
        if layout.last_stage:
            weights.final_norm = self._norm(names.final_norm())
            self._head(weights)
        return weights

    def _head(self, weights: Weights) -> None:
        if self._spec.tie_word_embeddings:
            weights.head = weights.embedding if self._layout.first_stage else self._vocabulary(self._names.head())
            return
        slices, height = self._names.head(), self._layout.padded_vocab_share(self._spec)

        def place(read: list[Weight]) -> None:
            weights.head = _padded(read[0], height)

        if not self._quantised.plan([slices], place):
            weights.head = self._vocabulary(slices)

    def _layer(self, index: int) -> LayerWeights:
        spec, names, naming = self._spec, self._names, self._spec.naming
        layer = LayerWeights(
            qkv_bias=self._vector(names.qkv(index, "bias")),
            output_bias=self._vector(names.attention_output(index, "bias")),
            mlp=self._moe(index) if spec.layers[index].sparse else self._mlp(index),
            query_norm=self._optional_norm(names.query_norm(index)),
            key_norm=self._optional_norm(names.key_norm(index)),
        )
        self._linear(layer, "qkv", names.qkv(index, "weight"))
        self._linear(layer, "output", names.attention_output(index, "weight"))
        if spec.norm_placement is not NormPlacement.POST:
            layer.input_norm = self._norm(names.norm(index, naming.input_norm))
            layer.mlp_input_norm = self._norm(names.norm(index, naming.mlp_input_norm))
        if spec.norm_placement is not NormPlacement.PRE:
            layer.attention_output_norm = self._norm(names.norm(index, naming.attention_output_norm))
            layer.mlp_output_norm = self._norm(names.norm(index, naming.mlp_output_norm))
        return layer

    def _mlp(self, index: int) -> MLPWeights:
        names = self._names
        mlp = MLPWeights(
            gate_up_bias=self._vector(names.gate_up(index, "bias")), down_bias=self._vector(names.down(index, "bias"))
        )
        self._linear(mlp, "gate_up", names.gate_up(index, "weight"))
        self._linear(mlp, "down", names.down(index, "weight"))
        return mlp

    def _moe(self, index: int) -> MoEWeights:
        names, moe = self._names, self._spec.moe
        assert moe is not None
        weights = MoEWeights()
        self._gate(weights, "router", names.router(index))
        self._experts(weights, "gate_up", names.experts_gate_up(index))
        self._experts(weights, "down", names.experts_down(index))
        if moe.shared_intermediate_size:
            weights.shared = MLPWeights()
            self._linear(weights.shared, "gate_up", names.shared_gate_up(index))
            self._linear(weights.shared, "down", names.shared_down(index))
            self._gate(weights, "shared_gate", names.shared_gate(index))
        return weights

    def _linear(self, owner: LayerWeights | MLPWeights, field: str, slices: list[TensorSlice]) -> None:
        """Give `owner` the weight, now or when it has been read."""
        if not self._quantised.plan([slices], lambda read: setattr(owner, field, read[0])):
            setattr(owner, field, self._matrix(slices))

    def _gate(self, owner: MoEWeights, field: str, slices: list[TensorSlice]) -> None:
        """The same for a small matrix that decides: few checkpoints quantise it, and it is used unquantised."""
        inputs, dtype = slices[0].shape[1], self._dtype
        if not self._quantised.plan(
            [slices], lambda read: setattr(owner, field, _dense(read[0], inputs, dtype)), only_if_stored_so=True
        ):
            setattr(owner, field, self._matrix(slices))

    def _experts(self, owner: MoEWeights, field: str, slices: list[TensorSlice]) -> None:
        """The same for one weight per expert."""
        assert self._spec.moe is not None
        count, inputs, dtype = self._spec.moe.num_experts, slices[0].num_columns or 0, self._dtype
        each = len(slices) // count
        stacks = [slices[start : start + each] for start in range(0, len(slices), each)]
        if not self._quantised.plan(stacks, lambda read: setattr(owner, field, _expert_weights(read, inputs, dtype))):
            setattr(owner, field, self._matrix(slices).unflatten(0, (count, -1)))

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


def _expert_weights(read: list[Weight], inputs: int, dtype: torch.dtype) -> ExpertWeights:
    """Those of all experts; where one is not quantised, none stays so."""
    quantised = [weight for weight in read if isinstance(weight, QuantisedWeight)]
    if len(quantised) == len(read):
        return quantised
    return torch.stack([_dense(weight, inputs, dtype) for weight in read])


def _dense(weight: Weight, inputs: int, dtype: torch.dtype) -> Tensor:
    return weight.dense(inputs, dtype) if isinstance(weight, QuantisedWeight) else weight


def _padded(weight: Weight, height: int) -> Weight:
    """`weight` with rows of zeros below."""
    rows = (0, 0, 0, height - len(weight))
    if rows[-1] == 0:
        return weight
    if isinstance(weight, Tensor):
        return functional.pad(weight, rows)
    return dataclasses.replace(
        weight,
        values=functional.pad(weight.values.view(torch.uint8), rows).view(weight.values.dtype),
        scales=functional.pad(weight.scales, rows),
        zeros=functional.pad(weight.zeros, rows) if weight.zeros is not None else None,
    )
