"""Rotary position embedding (arXiv:2104.09864) in the half-split form: dimension i turns with i + rotary_dim / 2."""

from __future__ import annotations

from torch import Tensor


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the leading dimensions of every head in place, in float32 and rounded once; the rest passes through.

        [ a  b ]  →  [ a cos - b sin    b cos + a sin ]        a, b: halves of the rotary dimensions

    Args:
        heads: [T, heads, head_dim]; a view into a larger matrix will do.
        cos, sin: [T, rotary_dim / 2] float32.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    a, b = heads[..., :half].float(), heads[..., half : 2 * half].float()
    turned = b * cos + a * sin  # before a is overwritten, which in float32 is a view
    heads[..., :half] = a * cos - b * sin
    heads[..., half : 2 * half] = turned
