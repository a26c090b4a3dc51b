"""GPTQ: rounding column by column, each column's error made up for by those that are not rounded yet.

arXiv:2210.17323, with two options of its published code: columns in the order of their inputs' energy, and scales that
are fixed beforehand, so that groups stay together and the checkpoint needs no permutation.
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
    order = products.diagonal().argsort(descending=True, stable=True)
    group_of = order // grid.size_of_groups(weight.shape[1])
    columns = weight.T[order].contiguous()  # a row per input: what one step works on lies together
    column_scales, column_zeros = scales.T[group_of].contiguous(), zeros.T[group_of].contiguous()
    factor = _inverse_factor(products[order][:, order])
    integers = torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            values, scale, zero = columns[i], column_scales[i], column_zeros[i]
            integers[i] = grid.nearest(values, scale, zero)
            error = (values - (integers[i] - zero) * scale) / factor[i, i]
            errors[i - start] = error
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    in_place = torch.empty_like(integers, dtype=torch.uint8)
    in_place[order] = integers.to(torch.uint8)
    return RoundedWeight(grid, in_place.T.contiguous(), scales, zeros)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with Uᵀ U = H⁻¹, for H damped until it can be inverted; changes the Hessian.

    With J the reversal of rows and columns and J H J = L Lᵀ, R = J L J is upper triangular and H = R Rᵀ, so U = R⁻¹.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item() or 1.0
    diagonal[diagonal == 0] = mean
    damping = DAMPING
    while True:
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(hessian)), upper=True)
        damping *= 10
