"""Root mean square normalisation, alone or after the residual addition that precedes it; see `kernels/norm.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(
    x_ptr, rows_ptr, weight_ptr, out_ptr, x_stride, out_stride, width, eps, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per row of the result; x_ptr and out_ptr may be the same."""
    row = tl.program_id(0)
    source = tl.load(rows_ptr + row).to(tl.int64) if HAS_ROWS else row.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + source * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    y = x * scale * weight
    tl.store(out_ptr + row.to(tl.int64) * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_rms_norm_kernel(
    hidden_ptr, x_ptr, weight_ptr, out_ptr, hidden_stride, x_stride, out_stride, width, alpha, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """hidden += alpha * x, and the norm of the sum as it was rounded. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    hidden = tl.load(hidden_ptr + row * hidden_stride + columns, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    rounded = (hidden + alpha * x).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + row * hidden_stride + columns, rounded, mask=mask)
    total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / width + eps)
    y = total * scale * weight
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor, rows: Tensor | None = None) -> Tensor:
    """The norm of `x` [T, width], or of its `rows` [S] int64, into `out`, which may be x itself. Rows of either may be
    parts of longer ones.

    Args:
        weight: [width] float32, with the family's offset already added.
    """
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(len(out),)](
        x, x if rows is None else rows, weight, out, x.stride(0), out.stride(0), width, eps,
        HAS_ROWS=rows is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def add_rms_norm(hidden: Tensor, x: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
    """hidden += alpha * x in place, both [T, width]; the norm of the sum as a new tensor."""
    width = x.shape[1]
    out = torch.empty_like(hidden)
    block = triton.next_power_of_2(width)
    add_rms_norm_kernel[(len(out),)](
        hidden, x, weight, out, hidden.stride(0), x.stride(0), out.stride(0), width, alpha, eps,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    """So that a thread has 8 to 16 elements, which is one or two 16-byte loads of bfloat16."""
    return min(16, max(1, block // 512))
