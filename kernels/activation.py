"""Gated activations: act(gate) * up, where gate and up lie side by side in one matrix."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """[T, 2 * width] → [T, width], a new contiguous tensor.

    Args:
        activation: "silu", "gelu" (exact) or "gelu_tanh" (tanh approximation).
    """
    width = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :width], gate_up[..., width:]
    if activation == "silu":
        return functional.silu(gate).mul_(up)
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)
