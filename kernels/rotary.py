"""Rotary position embedding (arXiv:2104.09864) in the half-split form: dimension i turns with i + rotary_dim / 2."""

from __future__ import annotations

from torch import Tensor


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of every head in place; the rest passes through.

        [ a  b ]  →  [ a cos - b sin    b cos + a sin ]        a, b: halves of the rotary dimensions

    Args:
        heads: [T, heads, head_dim]; a view into a larger matrix will do.
        cos: [T, 1, rotary_dim] of the same dtype, the two halves equal.
        sin: [T, 1, rotary_dim] of the same dtype, the first half negated: the formula then is two multiplications.
    """
    rotary_dim = cos.shape[-1]
    part = heads[..., :rotary_dim]
    swapped = part.roll(rotary_dim // 2, -1)
    part.mul_(cos).addcmul_(swapped, sin)
    return heads
