"""The loop over the inputs of a product with a quantised weight: unpacked in registers, multiplied in 16 bits.

Integers less their zero are exact in 16 bits; a group's sum is multiplied with its scale in float32. So the only
rounding is that of the sums, as with a weight that was never quantised.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import dot
from .unpack import unpack_bytes, unpack_nibbles

BLOCK_INPUTS = 128
"""A turn of the loop takes so many inputs; rows of packed weights are padded to it."""


@triton.jit
def _of_group(ptr, k, weight_rows, groups, stride, GROUP: tl.constexpr):
    """[1, N] float32: scales or zeros [groups, outputs] of the group that input k is in."""
    group = tl.minimum(k // GROUP, groups - 1) if GROUP else 0
    return tl.load(ptr + group * stride + weight_rows).to(tl.float32)[None, :]


@triton.jit
def add_part(
    y, x, x_high, packed, scales_ptr, zeros_ptr, weight_rows, k, groups, stride,
    BITS: tl.constexpr, FLOAT: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """y + the scaled products of PART inputs from k on (4 bits: of 2 * PART) with a tile of the weight.

    Args:
        x: [BLOCK_M, PART]; x_high: the PART inputs behind them, which with 4 bits lie in the high halves.
        packed: [PART, BLOCK_N] uint8.
    """
    zero = 8.0 if BITS == 4 else 128.0
    if ZEROS:
        zero = _of_group(zeros_ptr, k, weight_rows, groups, stride, GROUP)
    start = y
    if GROUP:
        start = tl.zeros_like(y)
    if BITS == 8:
        product = dot(x, unpack_bytes(packed, zero, FLOAT, DTYPE), start, "ieee")
    else:
        high_zero = zero
        together: tl.constexpr = GROUP % (2 * PART) == 0
        if ZEROS and not together:
            high_zero = _of_group(zeros_ptr, k + PART, weight_rows, groups, stride, GROUP)
        low, high = unpack_nibbles(packed, zero, high_zero, DTYPE)
        product = dot(x, low, start, "ieee")
        if together:
            product = dot(x_high, high, product, "ieee")
        else:
            high_product = dot(x_high, high, tl.zeros_like(y), "ieee")
            y += high_product * _of_group(scales_ptr, k + PART, weight_rows, groups, stride, GROUP)
    if GROUP:
        return y + product * _of_group(scales_ptr, k, weight_rows, groups, stride, GROUP)
    return product


@triton.jit
def multiply_quantised_tile(
    x_ptrs, valid, values_ptr, scales_ptr, zeros_ptr, weight_rows, up_rows, row_bytes, groups, stride,
    first, last, inputs,
    GATED: tl.constexpr, EVEN: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, ZEROS: tl.constexpr,
    GROUP: tl.constexpr, PART: tl.constexpr, BLOCK_INPUTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Products of a tile of rows with a tile of a packed weight (`quantised_layout.py`), and if GATED a second one.

    Args:
        x_ptrs: [BLOCK_M, 1] to the rows' first input; those that are not `valid` [BLOCK_M] count as zero.
        values_ptr: [.., row_bytes] uint8; scales_ptr, zeros_ptr: [groups, stride].
        weight_rows, up_rows: [BLOCK_N] int64, the rows of both tiles.
        first, last: blocks of BLOCK_INPUTS inputs.
        EVEN: the inputs are whole blocks.
        GROUP: inputs that share a scale; 0: a row has one scale.
        PART: inputs of one product with the matrix unit.

    Returns:
        Both [BLOCK_M, BLOCK_N] float32; the second is zero unless GATED.
    """
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k = tl.arange(0, PART)
    bytes_of_block: tl.constexpr = BLOCK_INPUTS * BITS // 8
    halves: tl.constexpr = 8 // BITS
    values_ptrs = values_ptr + weight_rows[None, :] * row_bytes + (first * bytes_of_block + k)[:, None]
    up_ptrs = values_ptr + up_rows[None, :] * row_bytes + (first * bytes_of_block + k)[:, None]
    for block in range(first, last):
        for part in tl.static_range(bytes_of_block // PART):
            start = block * BLOCK_INPUTS + part * halves * PART
            x_part = x_ptrs + (start + k)[None, :]
            x_high_part = x_part + (PART if BITS == 4 else 0)
            if EVEN:
                x = tl.load(x_part, mask=valid[:, None], other=0.0)
                x_high = tl.load(x_high_part, mask=valid[:, None], other=0.0) if BITS == 4 else x
            else:
                inside = (start + k)[None, :] < inputs
                x = tl.load(x_part, mask=valid[:, None] & inside, other=0.0)
                high_inside = (start + PART + k)[None, :] < inputs
                x_high = tl.load(x_high_part, mask=valid[:, None] & high_inside, other=0.0) if BITS == 4 else x
            y = add_part(
                y, x, x_high, tl.load(values_ptrs + part * PART), scales_ptr, zeros_ptr, weight_rows, start, groups,
                stride, BITS, FLOAT, ZEROS, GROUP, PART, dtype,
            )  # fmt: skip
            if GATED:
                up = add_part(
                    up, x, x_high, tl.load(up_ptrs + part * PART), scales_ptr, zeros_ptr, up_rows, start, groups,
                    stride, BITS, FLOAT, ZEROS, GROUP, PART, dtype,
                )  # fmt: skip
        values_ptrs += bytes_of_block
        up_ptrs += bytes_of_block
    if not GROUP:
        y *= _of_group(scales_ptr, 0, weight_rows, groups, stride, GROUP)
        if GATED:
            up *= _of_group(scales_ptr, 0, up_rows, groups, stride, GROUP)
    return y, up
