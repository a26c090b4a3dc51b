"""What matrix products with a weight [out, in] have in common: the loop over the inputs, and what comes at its end.

Where a weight has too few rows for every multiprocessor to get a tile, its columns are split among programs: each
writes its partial sum, and the one that comes last adds them all up, always in the same order, so that a result never
depends on which one that was.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .dot import dot


@triton.jit
def multiply_tile(
    x_ptrs, valid, weight_ptrs, up_ptrs, k, first, last, inputs,
    GATED: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of a tile of rows with a tile of the weight, and if GATED with a second one, over inputs first to last.

    Args:
        x_ptrs: [BLOCK_M, BLOCK_K] to the rows at input `first`; those that are not `valid` [BLOCK_M] count as zero.
        weight_ptrs, up_ptrs: [BLOCK_K, BLOCK_N], likewise at `first`.
        k: arange(BLOCK_K).
        EVEN: the inputs are whole blocks.

    Returns:
        Both [BLOCK_M, BLOCK_N] float32; the second is zero unless GATED.
    """
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptrs, mask=valid[:, None], other=0.0)
            y = dot(x, tl.load(weight_ptrs), y, "ieee")
            if GATED:
                up = dot(x, tl.load(up_ptrs), up, "ieee")
        else:
            inside = start + k < inputs
            x = tl.load(x_ptrs, mask=valid[:, None] & inside[None, :], other=0.0)
            y = dot(x, tl.load(weight_ptrs, mask=inside[:, None], other=0.0), y, "ieee")
            if GATED:
                up = dot(x, tl.load(up_ptrs, mask=inside[:, None], other=0.0), up, "ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    return y, up


@triton.jit
def gate(y, up, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """activation(y) * up in float32; as in the reference, both and the activation are rounded before they are used."""
    activated = activate(y.to(dtype).to(tl.float32), ACTIVATION).to(dtype).to(tl.float32)
    return activated * up.to(dtype).to(tl.float32)


@triton.jit
def sum_of_splits(partial_ptr, positions, mask, split_stride, splits):
    """Partial sums of a tile, in the order of the splits."""
    total = tl.load(partial_ptr + positions, mask=mask, other=0.0, cache_modifier=".cg")
    for _ in range(1, splits):
        partial_ptr += split_stride
        total += tl.load(partial_ptr + positions, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def store_tile(
    y, up, m, n, bias_ptr, out_ptr, rows, outputs, out_stride, alpha,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """out = y + bias, or if GATED activation(y + bias) * (up + bias); or if ADD out += alpha times that.

    Args:
        y, up: [BLOCK_M, BLOCK_N] float32; rows m and outputs n of the product.
        bias_ptr: [outputs], or [2 * outputs] if GATED.
    """
    mask = (m[:, None] < rows) & (n[None, :] < outputs)
    dtype = out_ptr.dtype.element_ty
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + outputs + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        y = gate(y, up, dtype, ACTIVATION)
    out_ptrs = out_ptr + m[:, None].to(tl.int64) * out_stride + n[None, :]
    if ADD:
        y = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32) + alpha * y
    tl.store(out_ptrs, y.to(dtype), mask=mask)


@triton.jit
def finish_tile(
    y, up, m, n, bias_ptr, out_ptr, partial_ptr, arrived_ptr, rows, outputs, out_stride, alpha,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """`store_tile`, if SPLIT by the last of the programs (…, split of the inputs) that multiply for this tile.

    Args:
        partial_ptr: [splits, 1 or 2 if GATED, rows, outputs] float32.
        arrived_ptr: to the tile's own count: zero, and zero again afterwards.
    """
    if SPLIT:
        mask = (m[:, None] < rows) & (n[None, :] < outputs)
        positions = m[:, None] * outputs + n[None, :]
        plane = rows * outputs
        split_stride = 2 * plane if GATED else plane
        mine = partial_ptr + tl.program_id(1) * split_stride
        tl.store(mine + positions, y, mask=mask)
        if GATED:
            tl.store(mine + plane + positions, up, mask=mask)
        # All threads' stores come before the count, which releases them to whoever comes last.
        tl.debug_barrier()
        splits = tl.num_programs(1)
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == splits - 1:
            tl.store(arrived_ptr, 0)
            y = sum_of_splits(partial_ptr, positions, mask, split_stride, splits)
            if GATED:
                up = sum_of_splits(partial_ptr + plane, positions, mask, split_stride, splits)
            store_tile(
                y, up, m, n, bias_ptr, out_ptr, rows, outputs, out_stride, alpha, HAS_BIAS, ADD, GATED, ACTIVATION
            )
    else:
        store_tile(y, up, m, n, bias_ptr, out_ptr, rows, outputs, out_stride, alpha, HAS_BIAS, ADD, GATED, ACTIVATION)
