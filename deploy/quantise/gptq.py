"""GPTQ: rounding column by column, each column's error made up for by those that are not rounded yet.

arXiv:2210.17323, with two options of its published code: columns in the order of their inputs' energy, and scales that
are fixed beforehand, so that groups stay together and the checkpoint needs no permutation.

Columns lie in ascending order and are rounded from the last to the first. Then the factor that the corrections come
from is lower triangular, V with Vᵀ V = H⁻¹, and is V = L⁻¹ for H = L Lᵀ: one factorisation and one inverse, both in
place. Besides H two matrices of its size are in memory while this is solved, and one afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import Grid, RoundedWeight
from .scale_search import search_scales

BLOCK = 128
"""Columns whose corrections to the rest are applied at once."""
DAMPING = 0.01
"""Of the mean of the Hessian's diagonal, added to it."""


def round_with_compensation(weight: Tensor, products: Tensor, grid: Grid) -> RoundedWeight:
    """Round a weight so that its outputs change little.

    Args:
        weight: [out, in] float32.
        products: the sum of x xᵀ over its inputs, [in, in] float32, finite.
    """
    scales, zeros = search_scales(weight, products, grid)
    order = products.diagonal().argsort(descending=True, stable=True).flip(0)
    columns = weight.T[order]  # a row per input: what one step works on lies together
    scales_of, zeros_of = scales.T.contiguous(), zeros.T.contiguous()
    factor = _inverse_factor(products, order)
    integers = torch.empty(columns.shape, dtype=torch.uint8)
    places, size = order.tolist(), grid.size_of_groups(weight.shape[1])
    for stop in range(len(columns), 0, -BLOCK):
        start = max(0, stop - BLOCK)
        errors = torch.empty_like(columns[start:stop])
        for i in reversed(range(start, stop)):
            group = places[i] // size
            values, scale, zero = columns[i], scales_of[group], zeros_of[group]
            nearest = grid.nearest(values, scale, zero)
            integers[places[i]] = nearest.to(torch.uint8)
            error = (values - (nearest - zero) * scale) / factor[i, i]
            errors[i - start] = error
            columns[start:i].addr_(factor[i, start:i], error, alpha=-1)
        columns[:start].addmm_(factor[start:stop, :start].T, errors, alpha=-1)
    return RoundedWeight(grid, integers.T.contiguous(), scales, zeros)


def _inverse_factor(products: Tensor, order: Tensor) -> Tensor:
    """Lower triangular V with Vᵀ V = H⁻¹, for H the products in this order, damped until it can be inverted."""
    diagonal = products.diagonal()[order]
    mean = diagonal.mean().item() or 1.0
    diagonal = torch.where(diagonal == 0, mean, diagonal)
    damping, failed = DAMPING, torch.empty((), dtype=torch.int32)
    while True:
        diagonal += damping * mean
        hessian = products[order[:, None], order]
        hessian.diagonal().copy_(diagonal)
        # LAPACK goes by columns: what it finds in place is the transpose, of a matrix that is its own.
        torch.linalg.cholesky_ex(hessian.mT, out=(hessian.mT, failed))
        if not failed:
            inverse = torch.eye(len(hessian))
            torch.linalg.solve_triangular(hessian, inverse.mT, upper=True, out=inverse.mT)
            return inverse
        damping *= 10
