"""The operations that a decoder is made of, as every implementation offers them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from .attention_metadata import AttentionMetadata
from .quantised_weight import QuantisedWeight, Weight


class Linear(Protocol):
    """A matrix product with a weight that never changes, so that it may be stored in the order in which it is read."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] → y [T, out], a new tensor of x's dtype; x's rows must be contiguous."""

    def float32(self, x: Tensor) -> Tensor:
        """The same in float32; valid until the next such call to any product of these kernels."""

    def add_to(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """hidden [T, out] += alpha * y, in place."""


Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [T, hidden], weights and ids [T, experts per token] → the weighted sum of each token's experts, a new tensor."""

ExpertWeights = Tensor | list[QuantisedWeight]
"""One weight per expert: [num_experts, out, in], or a list of them where they are quantised."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the step's positions, each [T, rotary_dim / 2] float32."""


class Plan(Protocol):
    """What an implementation works out once per step for all layers."""

    metadata: AttentionMetadata


class Kernels(Protocol):
    """The kernels of one decoder. T: rows of the step; all tensors are on the kernels' device and of its dtype unless
    said otherwise."""

    saved_bytes: int
    """By so much the weights that were taken over have become smaller."""
    steps_on_device: bool
    """Whether steps are launched ahead of their results (`actors/device_runner.py`)."""

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        """x weightᵀ + bias; takes over weight [out, in] and bias [out].

        With a quantised weight a result differs from `quantised_linear.QuantisedLinear`'s by rounding; kernels for CPUs
        round activations to 8 bits per group even where the checkpoint leaves them as they are."""

    def tied_linear(self, weight: Tensor) -> Linear:
        """A product whose weight's rows are looked up too, by `embed`."""

    def gated_linear(self, weight: Weight, bias: Tensor | None, activation: str) -> Callable[[Tensor], Tensor]:
        """activation(x gateᵀ) * (x upᵀ): [T, in] → [T, width].

        Args:
            weight: [2 * width, in], gate first; taken over like `bias` [2 * width].
            activation: "silu", "gelu" (exact) or "gelu_tanh" (tanh approximation).
        """

    def route(self, logits: Tensor, experts_per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
        """The experts of every token and their weights.

        Args:
            logits: [T, num_experts].
            normalize: scale a token's weights to sum to 1.

        Returns:
            weights [T, experts_per_token] float32, from a softmax over all experts, the largest first; ids of the same
            shape, integers.
        """

    def experts(self, gate_up: ExpertWeights, down: ExpertWeights, activation: str) -> Experts:
        """The gated MLPs of a mixture of experts, which take tokens and what `route` says about them.

        Args:
            gate_up: [num_experts, 2 * width, hidden], gate first; taken over like `down`.
            down: [num_experts, hidden, width].
            activation: as for `gated_linear`.
        """

    def embed(self, embedding: Linear, tokens: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """Rows of an embedding times `scale`.

        Args:
            embedding: from `tied_linear`, or a `PlainLinear`.
            tokens: [T] int64. A recorded call reads those of the step's plan instead.
            out: [T, hidden]; None: a new tensor.
        """

    def rotation(
        self, positions: Tensor, inverse_frequencies: Tensor, factor: float, out: Rotation | None = None
    ) -> Rotation:
        """Cosines and sines of position * inverse frequency, times `factor`.

        Args:
            positions: [T] int64. A recorded call reads those of the step's plan instead.
            inverse_frequencies: [rotary_dim / 2] float32, or one row of them per position.
        """

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, in_place: bool = False, rows: Tensor | None = None
    ) -> Tensor:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension of x [T, width], in float32 and rounded once.

        Args:
            weight: [width] float32, with the family's offset already added.
            in_place: write to x, whose rows may be parts of longer ones; else return a new tensor.
            rows: [S] int64: only these rows of x, in this order. A recorded call reads them when it runs.
        """

    def argmax(self, logits: Tensor) -> Tensor:
        """[S, vocab] float32 → [S] int64: the index of the largest, of equals the first, the first NaN before all."""

    def add_(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """hidden [T, width] += alpha * x, in place."""

    def add_norm(self, hidden: Tensor, x: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        """`add_`, and then the `rms_norm` of `hidden` as a new tensor; x may be a temporary of the layer before."""

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
        """Normalise and rotate queries and keys, and write the step's keys and values to their slots.

        NaN and infinity are stored as finite numbers: a block goes from one sequence to another and pads rows that
        are not its own, where its content is masked but may be multiplied. So what breaks one request cannot reach the
        next.

        Args:
            qkv: [T, heads + 2 * kv_heads, head_dim], contiguous; may be overwritten.
            k_cache, v_cache: [kv_heads, num_blocks, block_size, head_dim], written in place.
            norms: RMS norms of a head's queries and keys, each [head_dim] float32; None: there are none.
            scales: of a cache of 8 bits (`quantised_kv.py`), for keys and for values, each [kv_heads, num_blocks,
                block_size] float32, written in place; None: the cache is of the kernels' dtype.

        Returns:
            The queries, [T, heads, head_dim]; perhaps a view of qkv.
        """

    def plan(self, metadata: AttentionMetadata, block_size: int, tokens: Tensor | None = None) -> Plan:
        """Once per step, before the first layer.

        Args:
            tokens: [T] int64, where an embedding is recorded.
        """

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
        """softmax(softcap(scale * Q Kᵀ) + mask) V for every row; the softmax is float32.

        Args:
            query: [T, heads, head_dim]; a row's heads lie together.
            window: a token sees this many tokens, itself included; None: all before it.
            softcap: scores become softcap * tanh(score / softcap).
            scales: as `rotate_and_store` wrote them.

        Returns:
            [T, heads * head_dim], a new tensor.
        """

    def on_host(self, function: Callable[[Tensor], Tensor], x: Tensor, *, in_place: bool = False) -> Tensor:
        """function(x) [T, width] → the same shape and dtype, between the kernels: for what is not one of them.

        Args:
            in_place: the function returns x.
        """

    def begin_layer(self) -> None:
        """Temporaries that were made before are no longer needed; only matters while a program is recorded."""

    def new_program(self, max_rows: int) -> Program | None:
        """For steps of at most `max_rows` rows; None: these kernels gain nothing from being recorded."""


class Program(Protocol):
    """The kernels of a step, called once to be recorded and then run for every step: see `kernels/program.py`."""

    def recording(self) -> AbstractContextManager[None]:
        """Within, the kernels write down what they would do. Tensors have `max_rows` rows."""

    def buffer(self, width: int, dtype: torch.dtype) -> Tensor:
        """[max_rows, width] that the recorded kernels may read or write, and whoever runs the program too."""

    def plan(self) -> Plan:
        """A placeholder for the plan of a step, for recording."""

    def run(self, plan: Plan) -> None:
        """Do what was recorded, for the step of `plan`."""

    def run_rows(self, rows: int) -> None:
        """Do what was recorded, with kernels that need no more of a step than its number of rows."""

    def can_record(self, product: Linear) -> bool:
        """Whether `product.float32` is a kernel that a program may hold."""
