"""What matrix products with a weight [out, in] have in common: the loop over the inputs, and the gate at its end."""

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
