"""Gated activations: act(gate) * up, where gate and up lie side by side; see `kernels/activation.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

_BLOCK = 1024


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation of `ACTIVATIONS` on float32 values."""
    if ACTIVATION == 0:
        return x / (1.0 + tl.exp(-x))
    if ACTIVATION == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    # tanh(a) = 1 - 2 / (exp(2a) + 1), which is ±1 where the exponential overflows or vanishes.
    return 0.5 * x * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))


@triton.jit
def gated_activation_kernel(x_ptr, out_ptr, x_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, piece of the width)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    # The reference rounds the activation before it multiplies.
    activated = activate(gate, ACTIVATION).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (activated * up).to(out_ptr.dtype.element_ty), mask=mask)


def gated_activation(x: Tensor, activation: str) -> Tensor:
    """[T, 2 * width], gate first → [T, width], a new tensor.

    Args:
        activation: one of `ACTIVATIONS`.
    """
    width = x.shape[1] // 2
    out = torch.empty(len(x), width, dtype=x.dtype, device=x.device)
    gated_activation_kernel[(len(x), triton.cdiv(width, _BLOCK))](
        x, out, x.stride(0), width, ACTIVATION=ACTIVATIONS[activation], BLOCK=_BLOCK, num_warps=4
    )
    return out
