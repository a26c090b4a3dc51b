"""The kernels in plain torch, on any device: the meaning of every other implementation, and the path without one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import moe
from .activation import gated_activation
from .attention_metadata import AttentionMetadata
from .attention_plan import AttentionPlan
from .interface import Experts, ExpertWeights, Linear, Plan, Program, Rotation
from .linear import PackedLinear, PlainLinear, can_pack, look_up
from .norm import rms_norm
from .paged_attention import PagedAttention, store_kv
from .quantised_linear import QuantisedLinear
from .quantised_weight import QuantisedWeight, Weight
from .rotary import rotate_


class TorchKernels:
    """See `interface.Kernels`. Not shared between decoders: attention has a workspace."""

    steps_on_device = False

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._linear: type[PackedLinear | PlainLinear] = PackedLinear if can_pack(device, dtype) else PlainLinear
        self._attention = PagedAttention()
        self.saved_bytes = 0

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        """See `interface.Kernels`."""
        if isinstance(weight, QuantisedWeight):
            return QuantisedLinear(weight, bias)
        return self._linear(weight, bias)

    def tied_linear(self, weight: Tensor) -> Linear:
        """See `interface.Kernels`: packing would hold the weight twice."""
        return PlainLinear(weight)

    def gated_linear(self, weight: Weight, bias: Tensor | None, activation: str) -> Callable[[Tensor], Tensor]:
        """See `interface.Kernels`."""
        linear = self.linear(weight, bias)
        return lambda x: gated_activation(linear(x), activation)

    def route(self, logits: Tensor, experts_per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
        """See `interface.Kernels`."""
        return moe.route(logits, experts_per_token, normalize)

    def experts(self, gate_up: ExpertWeights, down: ExpertWeights, activation: str) -> Experts:
        """See `interface.Kernels`."""
        return moe.ProductsOfExperts(self, gate_up, down, activation)

    def embed(self, embedding: Linear, tokens: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """See `interface.Kernels`."""
        assert type(embedding) is PlainLinear, "a packed weight's rows are in nobody's order"
        return look_up(embedding.weight, tokens, scale, out)

    def rotation(
        self, positions: Tensor, inverse_frequencies: Tensor, factor: float, out: Rotation | None = None
    ) -> Rotation:
        """See `interface.Kernels`."""
        angles = positions.float()[:, None] * inverse_frequencies
        cos, sin = out or (torch.empty_like(angles), torch.empty_like(angles))
        torch.cos(angles, out=cos).mul_(factor)
        torch.sin(angles, out=sin).mul_(factor)
        return cos, sin

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, in_place: bool = False, rows: Tensor | None = None
    ) -> Tensor:
        """See `interface.Kernels`."""
        normalised = rms_norm(x if rows is None else x[rows], weight, eps)
        return x.copy_(normalised) if in_place else normalised

    def add_(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """See `interface.Kernels`."""
        hidden.add_(x, alpha=alpha)

    def add_norm(self, hidden: Tensor, x: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        """See `interface.Kernels`."""
        self.add_(hidden, x, alpha)
        return self.rms_norm(hidden, weight, eps)

    def rotate_and_store(
        self,
        qkv: Tensor,
        rotation: Rotation,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Plan,
        *,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See `interface.Kernels`."""
        kv_heads = len(k_cache)
        heads = qkv.shape[1] - 2 * kv_heads
        query, keys, values = qkv.split((heads, kv_heads, kv_heads), 1)
        if norms is not None:
            query.copy_(rms_norm(query, norms[0], eps))
            keys.copy_(rms_norm(keys, norms[1], eps))
        rotate_(qkv[:, : heads + kv_heads], *rotation)
        store_kv(keys, values, k_cache, v_cache, plan.metadata.slot_mapping, scales)
        return query

    def argmax(self, logits: Tensor) -> Tensor:
        """See `interface.Kernels`."""
        return logits.argmax(-1)

    def plan(self, metadata: AttentionMetadata, block_size: int, tokens: Tensor | None = None) -> AttentionPlan:
        """See `interface.Kernels`."""
        return self._attention.plan(metadata, block_size)

    def attention(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Plan,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See `interface.Kernels`."""
        assert isinstance(plan, AttentionPlan)
        return self._attention(
            query, k_cache, v_cache, plan, scale=scale, window=window, softcap=softcap, scales=scales
        ).flatten(1)

    def on_host(self, function: Callable[[Tensor], Tensor], x: Tensor, *, in_place: bool = False) -> Tensor:
        """See `interface.Kernels`."""
        return function(x)

    def begin_layer(self) -> None:
        """See `interface.Kernels`."""

    def new_program(self, max_rows: int) -> Program | None:
        """See `interface.Kernels`: torch has no list of calls."""
        return None
