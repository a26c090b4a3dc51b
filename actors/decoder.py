"""The decoder-only transformer that every model family is a setting of.

    hidden ──┬─ norm ─ qkv ─ qk norm ─ rotate ─ cache ─ attention ─ output ─ Σ ─ norm ─┐
             └──────────────────────────────────────────────────────────────────────────+──┬─ norm ─ MLP ─ Σ ─ norm ─┐
                                                                                           └─────────────────────────+──
    Σ: all-reduce over the tensor-parallel shards. Norms stand where `ModelSpec.norm_placement` puts them.

A shard computes its heads and widths of its stage's layers. The rows of a step lie one after the other in [T, hidden];
there is no batch dimension and no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..cluster.families import QKNorm
from ..cluster.layer_spec import LayerSpec
from ..cluster.model_spec import ModelSpec
from ..cluster.topology import ShardLayout
from ..kernels.attention_metadata import AttentionMetadata
from ..kernels.attention_plan import AttentionPlan
from ..kernels.backend import Kernels
from ..kernels.linear import PlainLinear
from .collectives import Collectives
from .kv_cache import KVCache
from .rope import Rotary
from .weights import LayerWeights, MLPWeights, MoEWeights, Weights


class Decoder:
    """One shard's part of a model."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: ShardLayout,
        weights: Weights,
        kernels: Kernels,
        collectives: Collectives,
        max_model_len: int,
    ) -> None:
        """Takes the weights over: `weights.layers` is emptied, so that each may be packed and freed in turn."""
        self._spec, self._layout = spec, layout
        self._kernels, self._collectives = kernels, collectives
        self._embedding = weights.embedding
        self._final_norm = weights.final_norm
        self._dtype = weights.layers[0].qkv.dtype
        device = weights.layers[0].qkv.device
        self._rotaries = [Rotary(rope, max_model_len, device) for rope in spec.ropes]
        self._layers: list[_Layer] = []
        for index in layout.layers(spec):
            layer = spec.layers[index]
            self._layers.append(_Layer(spec, layer, layout, weights.layers.pop(0), kernels, collectives))
        self._head = None
        if weights.head is not None:
            # A tied matrix is also the embedding, which needs rows in order: packing it would hold it twice.
            self._head = PlainLinear(weights.head) if spec.tie_word_embeddings else kernels.linear(weights.head, None)
            weights.head = None
        # As transformers does, the scale is rounded to the model's dtype: sqrt(3072) is 55.5 in bfloat16.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=self._dtype).item()
        self._first_token = layout.vocab(spec).start

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor | None, hidden: Tensor | None, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        """Run this stage's layers and write their keys and values to the cache.

        Args:
            tokens: [T] int64 on the first stage, else None.
            hidden: [T, hidden] from the stage before, changed in place; None on the first.

        Returns:
            [T, hidden] for the next stage or for `logits`.
        """
        if tokens is not None:
            hidden = self._embed(tokens)
        assert hidden is not None, "a later stage needs the hidden states of the one before"
        plan = self._kernels.attention.plan(metadata, kv_cache.block_size)
        rotations = [rotary.cos_sin(metadata.positions, self._dtype) for rotary in self._rotaries]
        for index, layer in enumerate(self._layers):
            layer.forward(hidden, rotations[layer.rope], plan, *kv_cache.layer(index))
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[S, hidden] from the last stage's `forward` → [S, vocab] float32, the same on every tensor-parallel rank.

        The final norm is applied here, so that only rows that sample pay for it.
        """
        assert self._head is not None, "only the last stage has an output projection"
        assert self._final_norm is not None
        spec = self._spec
        hidden = self._kernels.rms_norm(hidden, self._final_norm, spec.norm_eps)
        logits = self._collectives.all_gather_last_dim(self._head(hidden))[:, : spec.vocab_size].float()
        if spec.logits_scale != 1.0:
            logits = logits * spec.logits_scale
        if spec.logits_softcap is not None:
            logits = (logits / spec.logits_softcap).tanh_().mul_(spec.logits_softcap)
        return logits

    def _embed(self, tokens: Tensor) -> Tensor:
        """Every shard looks up the tokens whose rows it holds; the sum has each row once."""
        assert self._embedding is not None
        if self._layout.tp_size == 1:
            hidden = functional.embedding(tokens, self._embedding)
        else:
            local = tokens - self._first_token
            elsewhere = (local < 0) | (local >= len(self._embedding))
            hidden = functional.embedding(local.masked_fill_(elsewhere, 0), self._embedding)
            hidden = self._collectives.all_reduce(hidden.masked_fill_(elsewhere[:, None], 0))
        return hidden if self._embedding_scale == 1.0 else hidden.mul_(self._embedding_scale)


class _Layer:
    """Attention and MLP with their norms and residual connections."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: LayerSpec,
        layout: ShardLayout,
        weights: LayerWeights,
        kernels: Kernels,
        collectives: Collectives,
    ) -> None:
        self.rope = layer.rope
        self._eps, self._residual_scale = spec.norm_eps, spec.residual_scale
        self._input_norm, self._attention_output_norm = weights.input_norm, weights.attention_output_norm
        self._mlp_input_norm, self._mlp_output_norm = weights.mlp_input_norm, weights.mlp_output_norm
        self._kernels, self._collectives = kernels, collectives
        self._attention = _Attention(spec, layer, layout, weights, kernels, collectives)
        self._mlp: _MLP | _MoE
        if isinstance(weights.mlp, MLPWeights):
            self._mlp = _MLP(weights.mlp, spec.activation, kernels)
        else:
            self._mlp = _MoE(weights.mlp, spec, kernels)

    def forward(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], plan: AttentionPlan, k_cache: Tensor, v_cache: Tensor
    ) -> None:
        """Add this layer's contribution to `hidden` [T, hidden] in place."""
        attended = self._attention.forward(self._norm(hidden, self._input_norm), rotation, plan, k_cache, v_cache)
        self._add(hidden, attended, self._attention_output_norm)
        self._add(hidden, self._mlp.forward(self._norm(hidden, self._mlp_input_norm)), self._mlp_output_norm)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else self._kernels.rms_norm(x, weight, self._eps)

    def _add(self, hidden: Tensor, partial: Tensor, norm: Tensor | None) -> None:
        hidden.add_(self._norm(self._collectives.all_reduce(partial), norm), alpha=self._residual_scale)


class _Attention:
    """Self-attention over this shard's heads; what it returns is summed over shards."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: LayerSpec,
        layout: ShardLayout,
        weights: LayerWeights,
        kernels: Kernels,
        collectives: Collectives,
    ) -> None:
        self._heads, self._kv_heads = layout.num_heads(spec), layout.num_kv_heads(spec)
        self._head_dim = spec.head_dim
        self._eps = spec.norm_eps
        self._scale, self._softcap, self._window = spec.attention_scale, spec.attention_softcap, layer.window
        self._qk_norm = spec.qk_norm
        self._query_norm, self._key_norm = weights.query_norm, weights.key_norm
        # Key heads that several shards hold are counted once each in a sum over shards.
        self._query_width = spec.num_heads * spec.head_dim
        self._key_width = self._kv_heads * layout.tp_size * spec.head_dim
        self._qkv = kernels.linear(weights.qkv, weights.qkv_bias)
        self._output = kernels.linear(weights.output, weights.output_bias)
        self._kernels, self._collectives = kernels, collectives

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], plan: AttentionPlan, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """[T, hidden] → [T, hidden], this shard's part of the sum."""
        kernels, heads, kv_heads = self._kernels, self._heads, self._kv_heads
        qkv = self._qkv(x).view(len(x), heads + 2 * kv_heads, self._head_dim)
        if self._qk_norm is QKNorm.NONE:
            kernels.rotate_(qkv[:, : heads + kv_heads], *rotation)
            query, keys = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
        else:
            query, keys = self._normalised(qkv[:, :heads], qkv[:, heads : heads + kv_heads])
            kernels.rotate_(query, *rotation)
            kernels.rotate_(keys, *rotation)
        kernels.store_kv(keys, qkv[:, heads + kv_heads :], k_cache, v_cache, plan.metadata.slot_mapping)
        attended = kernels.attention(
            query, k_cache, v_cache, plan, scale=self._scale, window=self._window, softcap=self._softcap
        )
        return self._output(attended.flatten(1))

    def _normalised(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """New tensors [T, heads, head_dim] and [T, kv_heads, head_dim], normalised."""
        kernels = self._kernels
        assert self._query_norm is not None
        assert self._key_norm is not None
        if self._qk_norm is QKNorm.HEAD:
            return (
                kernels.rms_norm(query, self._query_norm, self._eps),
                kernels.rms_norm(keys, self._key_norm, self._eps),
            )
        flat_query, flat_keys = query.flatten(1), keys.flatten(1)
        squares = torch.cat((kernels.sum_of_squares(flat_query), kernels.sum_of_squares(flat_keys)), -1)
        squares = self._collectives.all_reduce(squares)
        query_mean, key_mean = squares[:, :1] / self._query_width, squares[:, 1:] / self._key_width
        return (
            kernels.scale_by_rms(flat_query, query_mean, self._query_norm, self._eps).view(query.shape),
            kernels.scale_by_rms(flat_keys, key_mean, self._key_norm, self._eps).view(keys.shape),
        )


class _MLP:
    """A gated MLP; what it returns is summed over shards."""

    def __init__(self, weights: MLPWeights, activation: str, kernels: Kernels) -> None:
        self._gate_up = kernels.linear(weights.gate_up, weights.gate_up_bias)
        self._down = kernels.linear(weights.down, weights.down_bias)
        self._activation, self._kernels = activation, kernels

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden]."""
        return self._down(self._kernels.gated_activation(self._gate_up(x), self._activation))


class _MoE:
    """Routed experts, and possibly a shared one behind a gate; every shard holds a part of each expert's width."""

    def __init__(self, weights: MoEWeights, spec: ModelSpec, kernels: Kernels) -> None:
        assert spec.moe is not None
        self._moe, self._activation, self._kernels = spec.moe, spec.activation, kernels
        self._router = kernels.linear(weights.router, None)
        self._gate_up = [kernels.linear(expert, None) for expert in weights.gate_up]
        self._down = [kernels.linear(expert, None) for expert in weights.down]
        self._shared = self._shared_gate = None
        if weights.shared is not None and weights.shared_gate is not None:
            self._shared = _MLP(weights.shared, spec.activation, kernels)
            self._shared_gate = kernels.linear(weights.shared_gate, None)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden]. Routing is the same on every shard, since x is."""
        kernels, moe = self._kernels, self._moe
        weights, ids = kernels.route(self._router(x), moe.experts_per_token, moe.normalize_weights)
        out = kernels.run_experts(x, weights, ids, self._gate_up, self._down, self._activation)
        if self._shared is not None and self._shared_gate is not None:
            out.addcmul_(torch.sigmoid(self._shared_gate(x)), self._shared.forward(x))
        return out
