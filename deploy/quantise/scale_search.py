"""Scales that leave out the largest weights of a group where the others gain more than those lose."""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import Grid

SHRINKS = tuple(1 - step / 40 for step in range(21))
"""Parts of a group's range that are tried: 1, 0.975 ... 0.5."""


def search_scales(weight: Tensor, products: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """For every group the range whose rounding error disturbs the outputs least, the other groups left aside.

    Args:
        weight: [out, in] float32.
        products: the sum of x xᵀ over its inputs, [in, in] float32.

    Returns:
        Scales and zeros [out, groups] float32.
    """
    groups = grid.grouped(weight)
    blocks = _diagonal_blocks(products, groups.shape[2])
    best_scales, best_zeros = grid.fit(groups)
    least = _errors(groups, best_scales, best_zeros, blocks, grid)
    for shrink in SHRINKS[1:]:
        scales, zeros = grid.fit(groups, shrink)
        errors = _errors(groups, scales, zeros, blocks, grid)
        better = errors < least
        least = torch.where(better, errors, least)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def _diagonal_blocks(products: Tensor, size: int) -> Tensor:
    """[in, in] → [groups, size, size], a view: products of inputs of the same group."""
    count = len(products) // size
    return products.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _errors(groups: Tensor, scales: Tensor, zeros: Tensor, blocks: Tensor, grid: Grid) -> Tensor:
    """[out, groups]: squared error of the outputs for each group alone."""
    scales, zeros = scales[..., None], zeros[..., None]
    error = groups - (grid.nearest(groups, scales, zeros) - zeros) * scales
    error = error.transpose(0, 1)  # [groups, out, size]
    return (torch.bmm(error, blocks) * error).sum(-1).T
