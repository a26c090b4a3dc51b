"""Root mean square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32 and rounded once.

    Args:
        x: [..., width] of any floating dtype.
        weight: [width] float32, with the family's offset already added.

    Returns:
        A new tensor of x's shape and dtype.
    """
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype)


def sum_of_squares(x: Tensor) -> Tensor:
    """[..., width] → [..., 1] float32: this shard's part of a norm whose width is divided among shards."""
    return x.float().square().sum(-1, keepdim=True)


def scale_by_rms(x: Tensor, mean_square: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The rest of `rms_norm` where the mean of squares over the whole width is known.

    Args:
        x: [..., part of the width].
        mean_square: [..., 1] float32.
        weight: [part of the width] float32.
    """
    return (x.float() * (mean_square + eps).rsqrt_()).mul_(weight).to(x.dtype)
