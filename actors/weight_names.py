"""Which slices of which checkpoint tensors make up each weight of a shard.

A weight is the slices of its list stacked along the first dimension. So are matrices fused that read the same input:

    qkv      [ q heads of this shard | k heads | v heads ]        × hidden
    gate_up  [ gate columns of this shard | up columns ]          × hidden
"""

from __future__ import annotations

import dataclasses

import torch

from ..cluster.families import QKNorm
from ..cluster.model_spec import ModelSpec
from ..cluster.topology import ShardLayout


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSlice:
    """Rows, and for matrices columns, of a checkpoint tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    rows: slice
    columns: slice | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    """What it may hold; (): any float of at least 16 bits."""

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def num_columns(self) -> int | None:
        """None for a vector."""
        if len(self.shape) < 2:
            return None
        return self.shape[1] if self.columns is None else self.columns.stop - self.columns.start

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the part."""
        columns = self.num_columns
        return (self.num_rows,) if columns is None else (self.num_rows, columns)


class WeightNames:
    """The slices of one shard. Every method returns a list for one weight; an empty one where the model has none."""

    def __init__(self, spec: ModelSpec, layout: ShardLayout, prefix: str, head: str) -> None:
        self._spec = spec
        self._layout = layout
        self._prefix = prefix
        self._head = head
        heads, kv_heads = layout.num_heads(spec), layout.num_kv_heads(spec)
        first, first_kv = layout.tp_rank * heads, layout.first_kv_head(spec)
        self._query_rows = slice(first * spec.head_dim, (first + heads) * spec.head_dim)
        self._kv_rows = slice(first_kv * spec.head_dim, (first_kv + kv_heads) * spec.head_dim)
        self._query_size = spec.num_heads * spec.head_dim
        self._kv_size = spec.num_kv_heads * spec.head_dim

    def embedding(self) -> list[TensorSlice]:
        return [self._vocabulary(f"{self._prefix}embed_tokens.weight")]

    def head(self) -> list[TensorSlice]:
        """The output projection; with tied embeddings the embedding."""
        return self.embedding() if self._spec.tie_word_embeddings else [self._vocabulary(self._head)]

    def final_norm(self) -> list[TensorSlice]:
        return [_whole(f"{self._prefix}norm.weight", self._spec.hidden_size)]

    def norm(self, layer: int, name: str) -> list[TensorSlice]:
        return [_whole(f"{self._layer(layer)}{name}.weight", self._spec.hidden_size)]

    def query_norm(self, layer: int) -> list[TensorSlice]:
        return self._qk_norm(f"{self._layer(layer)}self_attn.q_norm.weight", self._query_size, self._query_rows)

    def key_norm(self, layer: int) -> list[TensorSlice]:
        return self._qk_norm(f"{self._layer(layer)}self_attn.k_norm.weight", self._kv_size, self._kv_rows)

    def qkv(self, layer: int, kind: str) -> list[TensorSlice]:
        """`kind` is "weight" or "bias"."""
        if kind == "bias" and not self._spec.qkv_bias:
            return []
        parts = [
            ("q_proj", self._query_size, self._query_rows),
            ("k_proj", self._kv_size, self._kv_rows),
            ("v_proj", self._kv_size, self._kv_rows),
        ]
        return self._stacked(f"{self._layer(layer)}self_attn.", "qkv_proj", parts, kind)

    def attention_output(self, layer: int, kind: str) -> list[TensorSlice]:
        if kind == "bias" and not self._spec.output_bias:
            return []
        return self._row_parallel(f"{self._layer(layer)}self_attn.o_proj.{kind}", self._query_size, self._query_rows)

    def gate_up(self, layer: int, kind: str) -> list[TensorSlice]:
        if kind == "bias" and not self._spec.mlp_bias:
            return []
        width = self._spec.intermediate_size
        parts = [(name, width, self._share(width)) for name in ("gate_proj", "up_proj")]
        return self._stacked(f"{self._layer(layer)}mlp.", "gate_up_proj", parts, kind)

    def down(self, layer: int, kind: str) -> list[TensorSlice]:
        if kind == "bias" and not self._spec.mlp_bias:
            return []
        width = self._spec.intermediate_size
        return self._row_parallel(f"{self._layer(layer)}mlp.down_proj.{kind}", width, self._share(width))

    def router(self, layer: int) -> list[TensorSlice]:
        assert self._spec.moe is not None
        return [_whole(f"{self._moe(layer)}gate.weight", self._spec.moe.num_experts, self._spec.hidden_size)]

    def experts_gate_up(self, layer: int) -> list[TensorSlice]:
        """Gate and up of expert 0, of expert 1, ..."""
        moe, (gate, up, _) = self._spec.moe, self._spec.naming.experts
        assert moe is not None
        shape, rows = (moe.intermediate_size, self._spec.hidden_size), self._share(moe.intermediate_size)
        return [
            TensorSlice(f"{self._moe(layer)}experts.{expert}.{name}.weight", shape, rows)
            for expert in range(moe.num_experts)
            for name in (gate, up)
        ]

    def experts_down(self, layer: int) -> list[TensorSlice]:
        """Down of expert 0, of expert 1, ..."""
        moe, (_, _, down) = self._spec.moe, self._spec.naming.experts
        assert moe is not None
        columns = self._share(moe.intermediate_size)
        return [
            matrix
            for expert in range(moe.num_experts)
            for matrix in self._row_parallel(
                f"{self._moe(layer)}experts.{expert}.{down}.weight", moe.intermediate_size, columns
            )
        ]

    def shared_gate_up(self, layer: int) -> list[TensorSlice]:
        assert self._spec.moe is not None
        width = self._spec.moe.shared_intermediate_size
        shape = (width, self._spec.hidden_size)
        names = [f"{self._moe(layer)}shared_expert.{name}.weight" for name in ("gate_proj", "up_proj")]
        return [TensorSlice(name, shape, self._share(width)) for name in names]

    def shared_down(self, layer: int) -> list[TensorSlice]:
        assert self._spec.moe is not None
        width = self._spec.moe.shared_intermediate_size
        return self._row_parallel(f"{self._moe(layer)}shared_expert.down_proj.weight", width, self._share(width))

    def shared_gate(self, layer: int) -> list[TensorSlice]:
        return [_whole(f"{self._moe(layer)}shared_expert_gate.weight", 1, self._spec.hidden_size)]

    def _layer(self, layer: int) -> str:
        return f"{self._prefix}layers.{layer}."

    def _moe(self, layer: int) -> str:
        return f"{self._layer(layer)}{self._spec.naming.moe}."

    def _share(self, width: int) -> slice:
        """This shard's part of a dimension."""
        share = self._layout.share(width)
        return slice(self._layout.tp_rank * share, (self._layout.tp_rank + 1) * share)

    def _vocabulary(self, name: str) -> TensorSlice:
        rows = self._layout.vocab(self._spec)
        return TensorSlice(name, (self._spec.vocab_size, self._spec.hidden_size), slice(rows.start, rows.stop))

    def _qk_norm(self, name: str, full_width: int, rows: slice) -> list[TensorSlice]:
        if self._spec.qk_norm is QKNorm.NONE:
            return []
        if self._spec.qk_norm is QKNorm.HEAD:
            return [_whole(name, self._spec.head_dim)]
        return [TensorSlice(name, (full_width,), rows)]

    def _stacked(self, prefix: str, fused: str, parts: list[tuple[str, int, slice]], kind: str) -> list[TensorSlice]:
        """Column-parallel matrices of one input: (name, rows in the model, rows of this shard) each."""
        inputs = (self._spec.hidden_size,) if kind == "weight" else ()
        if not self._spec.naming.fused_qkv:
            return [TensorSlice(f"{prefix}{name}.{kind}", (size, *inputs), rows) for name, size, rows in parts]
        shape = (sum(size for _, size, _ in parts), *inputs)
        slices, offset = [], 0
        for _, size, rows in parts:
            slices.append(TensorSlice(f"{prefix}{fused}.{kind}", shape, slice(offset + rows.start, offset + rows.stop)))
            offset += size
        return slices

    def _row_parallel(self, name: str, width: int, columns: slice) -> list[TensorSlice]:
        """Column slice of a matrix whose products are summed over shards; its bias is added by the first shard only."""
        hidden = self._spec.hidden_size
        if name.endswith(".bias"):
            return [_whole(name, hidden)] if self._layout.tp_rank == 0 else []
        return [TensorSlice(name, (hidden, width), slice(0, hidden), columns)]


def _whole(name: str, *shape: int) -> TensorSlice:
    return TensorSlice(name, shape, slice(0, shape[0]))
