"""Activations rounded to 8 bits on the way into a product, as `quantised_weight.quantise_activations` has it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantised_weight import LIMITS

_BLOCK = 1024
"""A program takes about so many numbers, in whole groups."""


@triton.jit
def round_to_float8(x):
    """Float32 of at most 448 to the nearest float8_e4m3fn, ties to even, in float32; every GPU can do that."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    # Below 2^-6 the format's step is 2^-9, which is that of float32 between 2^14 and 2^15.
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)


@triton.jit
def round_activations_kernel(
    x_ptr, order_ptr, out_ptr, scales_ptr, x_stride, inputs, groups, group_size,
    ORDERED: tl.constexpr, INTEGER: tl.constexpr, EXPANDED: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rounded rows [T, inputs] and their scales [T, groups]. Program (row, BLOCK_GROUPS groups).

    ORDERED: input i is column order[i] of x. INTEGER: int8, else float8. EXPANDED: times the scale, in out's dtype.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    within = tl.arange(0, BLOCK)
    column = group[:, None] * group_size + within[None, :]
    mask = (within < group_size)[None, :] & (column < inputs)
    source = tl.load(order_ptr + column, mask=mask, other=0) if ORDERED else column
    x = tl.load(x_ptr + row * x_stride + source, mask=mask, other=0.0).to(tl.float32)
    limit: tl.constexpr = 127.0 if INTEGER else 448.0
    peak = tl.max(tl.abs(x), 1)
    unknown = tl.max((x != x).to(tl.int32), 1) > 0
    scale = tl.where(peak == 0.0, 1.0, tl.div_rn(peak, tl.full(peak.shape, limit, tl.float32)))
    scale = tl.where(unknown, float("nan"), scale)
    y = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    y = tl.where(y == y, tl.minimum(tl.maximum(y, -limit), limit), 0.0)
    if INTEGER:
        y = (y + 12582912.0) - 12582912.0  # 1.5 * 2²³: the step of float32 there is 1
    else:
        y = round_to_float8(y)
    if EXPANDED:
        y *= scale[:, None]
    else:
        tl.store(scales_ptr + row * groups + group, scale, mask=group < groups)
    tl.store(out_ptr + row * inputs + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def round_activations(
    x: Tensor, dtype: torch.dtype, group_size: int, *, order: Tensor | None = None, expanded: bool = False
) -> tuple[Tensor, Tensor]:
    """[T, in] in `dtype` and scales [T, groups] float32; see `quantised_weight.quantise_activations`.

    Args:
        order: [in] int64: input i is column order[i] of x.
        expanded: the first result is times its scales and in x's dtype; there are no scales then.
    """
    assert dtype in LIMITS
    assert x.stride(1) == 1
    inputs = x.shape[1] if order is None else len(order)
    groups = triton.cdiv(inputs, group_size)
    block = triton.next_power_of_2(group_size)
    block_groups = min(triton.next_power_of_2(groups), max(1, _BLOCK // block))
    out = torch.empty(len(x), inputs, dtype=x.dtype if expanded else dtype, device=x.device)
    scales = torch.empty(0 if expanded else len(x), groups, dtype=torch.float32, device=x.device)
    round_activations_kernel[(len(x), triton.cdiv(groups, block_groups))](
        x, x if order is None else order, out, scales, x.stride(0), inputs, groups, group_size,
        ORDERED=order is not None, INTEGER=dtype == torch.int8, EXPANDED=expanded,
        BLOCK_GROUPS=block_groups, BLOCK=block, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return out, scales
