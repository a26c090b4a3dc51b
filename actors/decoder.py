"""The decoder-only transformer that every model family is a setting of.

    hidden ──┬─ norm ─ qkv ─ qk norm ─ rotate ─ cache ─ attention ─ output ─ Σ ─ norm ─┐
             └──────────────────────────────────────────────────────────────────────────+──┬─ norm ─ MLP ─ Σ ─ norm ─┐
                                                                                           └─────────────────────────+──
    Σ: all-reduce over the tensor-parallel shards. Norms stand where `ModelSpec.norm_placement` puts them.

A shard computes its heads and widths of its stage's layers. The rows of a step lie one after the other in [T, hidden];
there is no batch dimension and no padding.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..cluster.families import QKNorm
from ..cluster.layer_spec import LayerSpec
from ..cluster.model_spec import ModelSpec
from ..cluster.topology import ShardLayout
from ..kernels.attention_metadata import AttentionMetadata
from ..kernels.interface import Kernels, Linear, Plan, Program, Rotation
from ..kernels.linear import PlainLinear
from ..kernels.norm import scale_by_rms, sum_of_squares
from .collectives import Collectives
from .kv_cache import KVCache, LayerCache
from .leading_views import leading_views
from .output_head import OutputHead
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
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Takes the weights over: `weights.layers` is emptied, so that each may be packed and freed in turn.

        Args:
            dtype: of activations, and of weights that are not quantised.
        """
        self._spec, self._layout = spec, layout
        self._kernels, self._collectives = kernels, collectives
        self._dtype = dtype
        self.argmax = kernels.argmax
        self._rotaries = [Rotary(rope, max_model_len, device) for rope in spec.ropes]
        self._layers: list[_Layer] = []
        for index in layout.layers(spec):
            layer = spec.layers[index]
            self._layers.append(_Layer(spec, layer, layout, weights.layers.pop(0), kernels, collectives))
        self._embedding: Linear | None = None
        head: Linear | None = None
        if weights.embedding is not None and weights.head is weights.embedding:
            self._embedding = head = kernels.tied_linear(weights.embedding)
        else:
            if weights.embedding is not None:
                self._embedding = PlainLinear(weights.embedding)
            if weights.head is not None:
                head = kernels.linear(weights.head)
        weights.embedding = weights.head = None
        self._head: OutputHead | None = None
        if head is not None:
            assert weights.final_norm is not None
            self._head = OutputHead(spec, weights.final_norm, head, kernels, collectives, sharded=layout.tp_size > 1)
        # As transformers does, the scale is rounded to the model's dtype: sqrt(3072) is 55.5 in bfloat16.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=self._dtype).item()
        self._vocabulary = layout.vocab(spec)
        self._recorded: _RecordedLayers | None = None

    def record(self, kv_cache: KVCache, max_tokens: int, max_rows: int) -> None:
        """Have the layers run as one program from now on, where the kernels can, and what follows them as another: for
        steps of at most `max_tokens` tokens that use `kv_cache`, of which at most `max_rows` sample."""
        program = self._kernels.new_program(max_tokens)
        if program is None:
            return
        hidden = program.buffer(self._spec.hidden_size, self._dtype)
        rotations = [
            (program.buffer(rope.rotary_dim // 2, torch.float32), program.buffer(rope.rotary_dim // 2, torch.float32))
            for rope in self._spec.ropes
        ]
        positions = torch.zeros(max_tokens, dtype=torch.int64)
        with program.recording():
            if self._layout.first_stage and self._layout.tp_size == 1:
                self._embed(positions, out=hidden)
            for rotary, rotation in zip(self._rotaries, rotations, strict=True):
                if not rotary.depends_on_positions:
                    rotary.cos_sin(positions, self._kernels, rotation)
            self._run_layers(hidden, rotations, program.plan(), kv_cache)
        self._recorded = _RecordedLayers(program, kv_cache, leading_views(hidden), rotations)
        if self._head is not None:
            self._head.record(hidden, max_rows)

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor | None, hidden: Tensor | None, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        """Run this stage's layers and write their keys and values to the cache.

        Args:
            tokens: [T] int64 on the first stage, else None.
            hidden: [T, hidden] from the stage before, changed in place; None on the first.

        Returns:
            [T, hidden] for the next stage or for `logits`; valid until the next call.
        """
        kernels, recorded = self._kernels, self._recorded
        plan = kernels.plan(metadata, kv_cache.block_size, tokens)
        if recorded is not None and recorded.kv_cache is kv_cache:
            return self._replay(recorded, tokens, hidden, plan)
        if tokens is not None:
            hidden = self._embed(tokens)
        assert hidden is not None, "a later stage needs the hidden states of the one before"
        rotations = [rotary.cos_sin(metadata.positions, kernels) for rotary in self._rotaries]
        self._run_layers(hidden, rotations, plan, kv_cache)
        return hidden

    def _replay(self, recorded: _RecordedLayers, tokens: Tensor | None, hidden: Tensor | None, plan: Plan) -> Tensor:
        """The same with the recorded program, after what could not be recorded."""
        positions = plan.metadata.positions
        rows = len(positions)
        result = recorded.hidden(rows, self._spec.hidden_size)
        if tokens is not None and self._layout.tp_size > 1:
            hidden = self._embed(tokens)
        if hidden is not None:
            result.copy_(hidden)
        for rotary, (cos, sin) in zip(self._rotaries, recorded.rotations, strict=True):
            if rotary.depends_on_positions:
                rotary.cos_sin(positions, self._kernels, (cos[:rows], sin[:rows]))
        recorded.program.run(plan)
        return result

    def _run_layers(self, hidden: Tensor, rotations: list[Rotation], plan: Plan, kv_cache: KVCache) -> None:
        """Add all layers' contributions to `hidden` in place."""
        self._kernels.begin_layer()
        x = self._layers[0].normalise(hidden)
        for index, (layer, following) in enumerate(itertools.pairwise((*self._layers, None))):
            assert layer is not None
            x = layer.forward(hidden, x, rotations[layer.rope], plan, kv_cache.layer(index), following)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """The logits of the given rows, or all.

        Args:
            hidden: [T, hidden] from the last stage's `forward`.
            rows: [S] int64.

        Returns:
            [S, vocab] float32, the same on every tensor-parallel rank; valid until the next call.
        """
        assert self._head is not None, "only the last stage has an output projection"
        return self._head.logits(hidden, rows)

    @torch.inference_mode()
    def likeliest(self, hidden: Tensor, rows: Tensor) -> list[int]:
        """The most likely token after each of the given S rows, `argmax` of their logits.

        Args:
            hidden, rows: as for `logits`.
        """
        assert self._head is not None, "only the last stage has an output projection"
        return self._head.likeliest(hidden, rows)

    def _embed(self, tokens: Tensor, out: Tensor | None = None) -> Tensor:
        """[T] int64 → [T, hidden]."""
        assert self._embedding is not None
        if self._layout.tp_size == 1:
            return self._kernels.embed(self._embedding, tokens, self._embedding_scale, out)
        # Every shard looks up the tokens whose rows it holds; the sum has each row once.
        local = tokens - self._vocabulary.start
        elsewhere = (local < 0) | (local >= len(self._vocabulary))
        hidden = self._kernels.embed(self._embedding, local.masked_fill_(elsewhere, 0), self._embedding_scale)
        return self._collectives.all_reduce(hidden.masked_fill_(elsewhere[:, None], 0))


@dataclasses.dataclass(frozen=True, slots=True)
class _RecordedLayers:
    """A stage's layers as a program, and what it reads and writes."""

    program: Program
    kv_cache: KVCache
    hidden: Callable[..., Tensor]
    """Views of the first rows of [max tokens, hidden], in and out."""
    rotations: list[Rotation]


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
        self._sharded = layout.tp_size > 1
        self._attention = _Attention(spec, layer, layout, weights, kernels, collectives)
        self._mlp: _MLP | _MoE
        if isinstance(weights.mlp, MLPWeights):
            self._mlp = _MLP(weights.mlp, spec.activation, kernels)
        else:
            self._mlp = _MoE(weights.mlp, spec, kernels)

    def normalise(self, hidden: Tensor) -> Tensor:
        """This layer's input [T, hidden], from the hidden states."""
        return self._norm(hidden, self._input_norm)

    def forward(
        self,
        hidden: Tensor,
        x: Tensor,
        rotation: Rotation,
        plan: Plan,
        cache: LayerCache,
        following: _Layer | None,
    ) -> Tensor:
        """Add this layer's contribution to `hidden` [T, hidden] in place.

        Args:
            x: as `normalise` gives it.
            following: the next layer of this stage.

        Returns:
            The input of the following layer: additions and the norms behind them are one kernel where that is faster.
        """
        attended = self._attention.forward(x, rotation, plan, cache)
        x = self._project(hidden, self._attention.output, attended, self._attention_output_norm, self._mlp_input_norm)
        next_norm = following._input_norm if following is not None else None
        if isinstance(self._mlp, _MLP):
            gated = self._mlp.forward(x)
            return self._project(hidden, self._mlp.down, gated, self._mlp_output_norm, next_norm, last=True)
        mixed = self._kernels.on_host(self._mlp.forward, x)
        return self._add(hidden, mixed, self._mlp_output_norm, next_norm, last=True)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else self._kernels.rms_norm(x, weight, self._eps)

    def _project(
        self,
        hidden: Tensor,
        linear: Linear,
        x: Tensor,
        norm: Tensor | None,
        next_norm: Tensor | None,
        *,
        last: bool = False,
    ) -> Tensor:
        """Add the product of a block's last weight, at once where nothing comes in between; what follows takes the
        result."""
        if norm is None and not self._sharded:
            linear.add_to(hidden, x, self._residual_scale)
            if last:
                self._kernels.begin_layer()
            return self._norm(hidden, next_norm)
        return self._add(hidden, linear(x), norm, next_norm, last=last)

    def _add(
        self, hidden: Tensor, partial: Tensor, norm: Tensor | None, next_norm: Tensor | None, *, last: bool = False
    ) -> Tensor:
        kernels = self._kernels
        if self._sharded:
            partial = kernels.on_host(self._collectives.all_reduce, partial, in_place=True)
        if norm is not None:
            partial = kernels.rms_norm(partial, norm, self._eps, in_place=True)
        if last:
            kernels.begin_layer()
        if next_norm is not None:
            return kernels.add_norm(hidden, partial, self._residual_scale, next_norm, self._eps)
        kernels.add_(hidden, partial, self._residual_scale)
        return hidden


class _Attention:
    """Self-attention over this shard's heads."""

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
        self._head_norms: tuple[Tensor, Tensor] | None = None
        self._full_norms: tuple[Tensor, Tensor] | None = None
        if weights.query_norm is not None and weights.key_norm is not None:
            norms = (weights.query_norm, weights.key_norm)
            if spec.qk_norm is QKNorm.HEAD:
                self._head_norms = norms
            else:
                self._full_norms = norms
        # Key heads that several shards hold are counted once each in a sum over shards.
        self._query_width = spec.num_heads * spec.head_dim
        self._key_width = self._kv_heads * layout.tp_size * spec.head_dim
        self._sharded = layout.tp_size > 1
        self._qkv = kernels.linear(weights.qkv, weights.qkv_bias)
        self.output = kernels.linear(weights.output, weights.output_bias)
        """[T, heads * head_dim] → [T, hidden], to be summed over shards."""
        self._kernels, self._collectives = kernels, collectives

    def forward(self, x: Tensor, rotation: Rotation, plan: Plan, cache: LayerCache) -> Tensor:
        """[T, hidden] → [T, heads * head_dim], for `output`."""
        kernels = self._kernels
        qkv = self._qkv(x)
        if self._full_norms is not None:
            self._normalise(qkv, *self._full_norms)
        query = kernels.rotate_and_store(
            qkv.view(len(qkv), self._heads + 2 * self._kv_heads, self._head_dim),
            rotation,
            cache.keys,
            cache.values,
            plan,
            norms=self._head_norms,
            eps=self._eps,
            scales=cache.scales,
        )
        return kernels.attention(
            query,
            cache.keys,
            cache.values,
            plan,
            scale=self._scale,
            window=self._window,
            softcap=self._softcap,
            scales=cache.scales,
        )

    def _normalise(self, qkv: Tensor, query_norm: Tensor, key_norm: Tensor) -> None:
        """Normalise queries and keys over their whole width, in place."""
        if self._sharded:
            self._kernels.on_host(lambda qkv: self._normalise_share(qkv, query_norm, key_norm), qkv, in_place=True)
            return
        query, keys = self._query_and_keys(qkv)
        self._kernels.rms_norm(query, query_norm, self._eps, in_place=True)
        self._kernels.rms_norm(keys, key_norm, self._eps, in_place=True)

    def _normalise_share(self, qkv: Tensor, query_norm: Tensor, key_norm: Tensor) -> Tensor:
        """The same where every shard has a part of the width."""
        query, keys = self._query_and_keys(qkv)
        squares = torch.cat((sum_of_squares(query), sum_of_squares(keys)), -1)
        squares = self._collectives.all_reduce(squares)
        query_mean, key_mean = squares[:, :1] / self._query_width, squares[:, 1:] / self._key_width
        query.copy_(scale_by_rms(query, query_mean, query_norm, self._eps))
        keys.copy_(scale_by_rms(keys, key_mean, key_norm, self._eps))
        return qkv

    def _query_and_keys(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Views [T, heads * head_dim] and [T, kv_heads * head_dim]."""
        query_end = self._heads * self._head_dim
        return qkv[:, :query_end], qkv[:, query_end : query_end + self._kv_heads * self._head_dim]


class _MLP:
    """A gated MLP."""

    def __init__(self, weights: MLPWeights, activation: str, kernels: Kernels) -> None:
        self._gated = kernels.gated_linear(weights.gate_up, weights.gate_up_bias, activation)
        self.down = kernels.linear(weights.down, weights.down_bias)
        """[T, width] → [T, hidden], to be summed over shards."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] → [T, width], for `down`."""
        return self._gated(x)


class _MoE:
    """Routed experts, and possibly a shared one behind a gate; every shard holds a part of each expert's width."""

    def __init__(self, weights: MoEWeights, spec: ModelSpec, kernels: Kernels) -> None:
        assert spec.moe is not None
        self._moe = spec.moe
        self._router = kernels.linear(weights.router)
        self._experts = kernels.experts(weights.gate_up, weights.down, spec.activation)
        self._route = kernels.route
        self._shared: _MLP | None = None
        self._shared_gate: Linear | None = None
        if weights.shared is not None and weights.shared_gate is not None:
            self._shared = _MLP(weights.shared, spec.activation, kernels)
            self._shared_gate = kernels.linear(weights.shared_gate)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden], to be summed over shards. Routing is the same on every shard, since x is."""
        weights, ids = self._route(self._router(x), self._moe.experts_per_token, self._moe.normalize_weights)
        out = self._experts(x, weights, ids)
        if self._shared is not None and self._shared_gate is not None:
            out.addcmul_(torch.sigmoid(self._shared_gate(x)), self._shared.down(self._shared.forward(x)))
        return out
