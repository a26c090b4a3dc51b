"""Weights on a grid of integers: scales, zero points, and rounding to nearest."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .options import CHANNEL


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that a weight may have: (integer - zero) * scale, the integer of 0 to 2^bits - 1."""

    bits: int
    group_size: int
    """Inputs that share scale and zero; `CHANNEL`: all."""
    symmetric: bool
    """The zero is the middle, 2^(bits - 1)."""
    scale_dtype: torch.dtype
    """In which scales are stored."""

    @property
    def highest(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1

    def size_of_groups(self, inputs: int) -> int:
        """Inputs that share a scale, of a weight with so many."""
        return inputs if self.group_size == CHANNEL else self.group_size

    def grouped(self, weight: Tensor) -> Tensor:
        """[out, in] → [out, groups, group size], a view."""
        return weight.unflatten(1, (-1, self.size_of_groups(weight.shape[1])))

    def fit(self, groups: Tensor, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
        """Scales and zeros that cover `shrink` times the range of each group.

        As compressed-tensors does (`quantization/utils/helpers.py`, `calculate_qparams`): a symmetric scale is the
        largest magnitude over half the number of steps, so that both ends are rounded by half a step.

        Args:
            groups: [..., group size] float32.

        Returns:
            Scales [...] float32, rounded to `scale_dtype`, and zeros [...] float32.
        """
        low, high = groups.amin(-1).clamp_(max=0) * shrink, groups.amax(-1).clamp_(min=0) * shrink
        if self.symmetric:
            scales = self._stored(torch.maximum(-low, high) * (2 / self.highest))
            return scales, torch.full_like(scales, 1 << (self.bits - 1))
        scales = self._stored((high - low) / self.highest)
        return scales, (-low / scales).round_().clamp_(0, self.highest)

    def _stored(self, scales: Tensor) -> Tensor:
        rounded = scales.to(self.scale_dtype).float()
        return torch.where(rounded == 0, 1.0, rounded)

    def nearest(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The integers, as float32, nearest to `values`; all three broadcast."""
        return (values / scales).round_().add_(zeros).clamp_(0, self.highest)

    def round(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> RoundedWeight:
        """Round a weight [out, in] float32 to nearest, with scales and zeros [out, groups]."""
        integers = self.nearest(self.grouped(weight), scales[..., None], zeros[..., None]).flatten(1)
        return RoundedWeight(self, integers.to(torch.uint8), scales, zeros)


@dataclasses.dataclass(frozen=True, slots=True)
class RoundedWeight:
    """A weight [out, in] on its grid."""

    grid: Grid
    integers: Tensor
    """[out, in] uint8."""
    scales: Tensor
    """[out, groups] float32, of values that `grid.scale_dtype` has."""
    zeros: Tensor
    """[out, groups] float32, of integers."""

    def dequantise(self) -> Tensor:
        """[out, in] float32."""
        values = self.grid.grouped(self.integers.float())
        return (values - self.zeros[..., None]).mul_(self.scales[..., None]).flatten(1)

    def rows(self, start: int, stop: int) -> RoundedWeight:
        """Some of the outputs."""
        rows = slice(start, stop)
        return RoundedWeight(self.grid, self.integers[rows], self.scales[rows], self.zeros[rows])


def round_to_nearest(weight: Tensor, grid: Grid) -> RoundedWeight:
    """Every value of a weight [out, in] float32 to its nearest neighbour, scales from the largest of each group."""
    return grid.round(weight, *grid.fit(grid.grouped(weight)))
