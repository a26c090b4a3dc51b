"""The columns of a quantised matrix in groups of equal size, however the checkpoint or a shard's slice divides them.

stored groups of 4      a a a a b b b b c c c c        act order         b a a c b c a b …
slice from column 6             b b c c c c            sorted            a a a · b b b · c c · ·
groups of gcd(4, 6)             b b|c c|c c            filled up         · is a column of zeros
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..kernels.quantised_weight import QuantisedWeight, pack_nibbles, unpack_nibbles

SMALLEST_GROUP = 32
"""Inputs. Groups are not divided below this, as every one has a scale: what does not fit is filled up."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredGroups:
    """Some columns of a matrix with the scales of their groups."""

    values: Tensor
    """[out, in] uint8 with `bits` of them used, or float8_e4m3fn; or [out, in / 2] uint8 of 4 bits each (`nibbles`)."""
    scales: Tensor
    """[out, groups]."""
    zeros: Tensor | None
    """[out, groups] uint8; None: the middle of the range."""
    bits: int
    group_size: int
    first_column: int
    """Of `values`, counted from the first column of the first of the groups."""
    group_of: Tensor | None
    """[in] int64 on the CPU: the group of every column; None: they follow one another."""
    activations: torch.dtype | None
    nibbles: bool = False
    """Values are packed already as kernels take them."""

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        return self.values.shape[1] * (2 if self.nibbles else 1)


def quantised_weight(stored: StoredGroups) -> QuantisedWeight:
    """The matrix as kernels take it: exactly the same numbers, each column once or, between them, columns of zeros."""
    stored = _without_needless_zeros(stored)
    inputs, size = stored.inputs, stored.group_size
    columns = stored.first_column + torch.arange(inputs)
    regular = columns // size
    if stored.group_of is not None and not torch.equal(stored.group_of, regular):
        return _sorted(stored, stored.group_of)
    if regular[0] == regular[-1]:
        return _assembled(stored, regular[:1], inputs, None)
    fitting = math.gcd(size, stored.first_column)
    if fitting < min(size, SMALLEST_GROUP):
        return _sorted(stored, regular)
    return _assembled(stored, regular[::fitting], fitting, None)


def _sorted(stored: StoredGroups, group_of: Tensor) -> QuantisedWeight:
    """Columns of a group beside each other, every group filled up to a multiple of the size that takes least memory."""
    stored = _unpacked(stored)
    counts = torch.bincount(group_of)
    size = min(_sizes(stored.group_size), key=lambda size: _cost(stored, counts, size))
    filled = _filled(counts, size)
    group_at = torch.repeat_interleave(torch.arange(len(counts)), filled)
    by_group = torch.argsort(group_of, stable=True)
    start, start_filled = counts.cumsum(0) - counts, filled.cumsum(0) - filled
    sorted_groups = group_of[by_group]
    place = start_filled[sorted_groups] + torch.arange(len(group_of)) - start[sorted_groups]
    # A column of zeros meets an input that its group has anyway, whose largest it therefore does not change.
    order = by_group[start[group_at]]
    order[place] = by_group
    filler = torch.ones(len(order), dtype=torch.bool)
    filler[place] = False
    device = stored.values.device
    # float8 has no indexing of its own on every device.
    values = stored.values.view(torch.uint8)[:, order.to(device)].view(stored.values.dtype)
    if filler.any():
        columns = filler.nonzero()[:, 0].to(device)
        values.view(torch.uint8)[:, columns] = _zeros_at(stored, group_at.to(device)[columns])
    return _assembled(dataclasses.replace(stored, values=values), group_at[::size], size, order)


def _sizes(size: int) -> list[int]:
    sizes = [size]
    while sizes[-1] % 4 == 0 and sizes[-1] // 2 >= SMALLEST_GROUP:
        sizes.append(sizes[-1] // 2)
    return sizes


def _cost(stored: StoredGroups, counts: Tensor, size: int) -> float:
    """Bytes of a row."""
    columns = int(_filled(counts, size).sum())
    return columns * (0.5 if stored.bits <= 4 else 1.0) + -(-columns // size) * (
        stored.scales.element_size() + (stored.zeros is not None)
    )


def _filled(counts: Tensor, size: int) -> Tensor:
    """How many columns every group gets; the last may be short, but not odd."""
    filled = -(-counts // size) * size
    filled[-1] = counts[-1] + counts[-1] % 2
    return filled


def _zeros_at(stored: StoredGroups, groups: Tensor) -> Tensor | int:
    """The values that stand for zero in columns of these groups."""
    if stored.values.dtype.is_floating_point:
        return 0
    return 1 << (stored.bits - 1) if stored.zeros is None else stored.zeros[:, groups]


def _assembled(stored: StoredGroups, group_of_each: Tensor, size: int, order: Tensor | None) -> QuantisedWeight:
    """`group_of_each`: [groups of `size`] the stored group that each is a part of."""
    inputs = stored.inputs
    size = min(size, inputs)
    if size % 2:
        stored = _unpacked(stored)
    values, device = stored.values, stored.values.device
    scales, zeros = stored.scales, stored.zeros
    if not torch.equal(group_of_each, torch.arange(scales.shape[1])):
        index = group_of_each.to(device)
        scales, zeros = scales[:, index], zeros[:, index] if zeros is not None else None
    bits = 4 if stored.nibbles else 8
    if not stored.nibbles and not values.dtype.is_floating_point:
        if stored.bits <= 4 and inputs % 2 == 0 and size % 2 == 0:
            bits = 4
        if zeros is None and bits > stored.bits:
            values = values + ((1 << (bits - 1)) - (1 << (stored.bits - 1)))
        if bits == 4:
            values = pack_nibbles(values)
    return QuantisedWeight(
        values=values.contiguous(),
        scales=scales.contiguous(),
        zeros=zeros.contiguous() if zeros is not None else None,
        bits=bits,
        group_size=size,
        activations=stored.activations,
        order=order.to(device) if order is not None else None,
    )


def _unpacked(stored: StoredGroups) -> StoredGroups:
    if not stored.nibbles:
        return stored
    return dataclasses.replace(stored, values=unpack_nibbles(stored.values), nibbles=False)


def _without_needless_zeros(stored: StoredGroups) -> StoredGroups:
    if stored.zeros is not None and bool((stored.zeros == 1 << (stored.bits - 1)).all()):
        return dataclasses.replace(stored, zeros=None)
    return stored
