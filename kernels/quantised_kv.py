"""Keys and values in 8 bits: every head of every token has a scale of its own, so nothing is calibrated."""

from __future__ import annotations

import torch
from torch import Tensor

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest magnitude that is stored, by the cache's dtype."""


def quantise(heads: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[..., head_dim] finite → the same in `dtype`, one of `LIMITS`, and scales [...] float32: their product is the
    original, but for rounding. A head of zeros has scale 1."""
    limit = LIMITS[dtype]
    wide = heads.float()
    scale = wide.abs().amax(-1) / limit
    scale = torch.where(scale > 0, scale, 1.0)
    scaled = wide / scale[..., None]
    if not dtype.is_floating_point:
        scaled = torch.floor(scaled + 0.5)
    return scaled.clamp_(-limit, limit).to(dtype), scale


def dequantise(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: [..., head_dim] and [...] → [..., head_dim] in `dtype`."""
    return (stored.float() * scales[..., None]).to(dtype)
