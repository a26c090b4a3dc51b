"""A weight in few bits, in the one form that every loader makes and every kernel takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest magnitude that activations are rounded to, by dtype."""


@dataclasses.dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight [out, in]: weight[o, i] = (value[o, i] - zero[o, g]) * scale[o, g] with g = i // group_size.

    Integers are unsigned; signed ones of a checkpoint have the middle of the range added, which is then their zero.
    """

    values: Tensor
    """4 bits: [out, in / 2] uint8, two inputs to a byte, the first in the low half. 8 bits: [out, in] uint8 or
    float8_e4m3fn."""
    scales: Tensor
    """[out, groups] float32, bfloat16 or float16, as stored; groups = ceil(in / group_size): the last one may be
    short."""
    zeros: Tensor | None
    """[out, groups] uint8; None: the middle, 8 or 128, or 0 with floats."""
    bits: int
    """4 or 8; what has fewer than 4 is kept in 4."""
    group_size: int
    """Inputs that share a scale, at most `in`; even."""
    activations: torch.dtype | None = None
    """int8 or float8_e4m3fn: the checkpoint wants activations rounded to this; None: they stay as they are. A row has
    one scale per group of inputs, so one in all where the group is the whole row."""
    order: Tensor | None = None
    """[in] int64: column i meets input order[i] of x. So columns of one group lie together whatever the checkpoint (act
    order), and a column of zeros may fill a group up; None: column i meets input i."""

    def __post_init__(self) -> None:
        out, inputs = self.shape
        assert self.bits in (4, 8)
        assert 0 < self.group_size <= inputs
        assert self.group_size % 2 == 0 or self.bits == 8
        groups = (out, -(-inputs // self.group_size))
        assert tuple(self.scales.shape) == groups, f"{tuple(self.scales.shape)} scales for {groups} groups"
        assert self.zeros is None or tuple(self.zeros.shape) == groups
        assert self.order is None or self.order.shape == (inputs,)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); `in` counts the weight's columns."""
        out, width = self.values.shape
        return out, width * (2 if self.bits == 4 else 1)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_float(self) -> bool:
        """Whether the values are floats."""
        return self.values.dtype.is_floating_point

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all that belongs to the weight."""
        parts = (self.values, self.scales, self.zeros, self.order)
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self, rows: slice) -> QuantisedWeight:
        """Some of its outputs."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return dataclasses.replace(self, values=self.values[rows], scales=self.scales[rows], zeros=zeros)

    def integers(self) -> Tensor:
        """[out, in] uint8, one value to a byte."""
        assert not self.is_float
        return unpack_nibbles(self.values) if self.bits == 4 else self.values

    def per_input(self, of_groups: Tensor) -> Tensor:
        """[out, groups] → [out, in]: every group's entry once for each of its inputs."""
        return of_groups.repeat_interleave(self.group_size, 1)[:, : self.shape[1]]

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`, rounded once, its columns in their own order (`order` is left to x)."""
        scales = self.per_input(self.scales.float())
        if self.is_float:
            return (self.values.float() * scales).to(dtype)
        zeros = self.per_input(self.zeros).float() if self.zeros is not None else float(1 << (self.bits - 1))
        return ((self.integers().float() - zeros) * scales).to(dtype)

    def dense(self, inputs: int, dtype: torch.dtype) -> Tensor:
        """The weight [out, inputs] in `dtype` for x as it comes: `order` is undone."""
        columns = self.dequantise(torch.float32)
        if self.order is None:
            return columns.to(dtype)
        return columns.new_zeros(len(self), inputs).index_add_(1, self.order, columns).to(dtype)


Weight = Tensor | QuantisedWeight
"""A weight [out, in] of any kind."""


def pack_nibbles(integers: Tensor) -> Tensor:
    """[out, in] uint8 below 16 → [out, in / 2] uint8, the first of two in the low half."""
    return integers[:, 0::2] | (integers[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse: [out, in / 2] → [out, in]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def stack_weights(parts: Sequence[Weight], inputs: int, dtype: torch.dtype) -> Weight:
    """Weights of the same input, one below the other. Parts that cannot be one quantised weight become a dense one.

    Args:
        inputs: of x.
        dtype: of a dense result.
    """
    if len(parts) == 1:
        return parts[0]
    quantised = [part for part in parts if isinstance(part, QuantisedWeight)]
    first = quantised[0] if quantised else None
    if first is None or len(quantised) < len(parts) or not all(_alike(first, part) for part in quantised):
        return torch.cat(
            [part.dense(inputs, dtype) if isinstance(part, QuantisedWeight) else part.to(dtype) for part in parts]
        )
    zeros: Tensor | None = None
    if any(part.zeros is not None for part in quantised):
        zeros = torch.cat([_explicit_zeros(part) for part in quantised])
    return dataclasses.replace(
        first,
        values=torch.cat([part.values for part in quantised]),
        scales=torch.cat([part.scales for part in quantised]),
        zeros=zeros,
    )


def _alike(a: QuantisedWeight, b: QuantisedWeight) -> bool:
    """Whether two weights differ in their numbers only."""
    if (a.values.dtype, a.scales.dtype, a.bits, a.group_size, a.activations, a.shape[1]) != (
        b.values.dtype,
        b.scales.dtype,
        b.bits,
        b.group_size,
        b.activations,
        b.shape[1],
    ):
        return False
    if a.order is None or b.order is None:
        return a.order is b.order
    return torch.equal(a.order, b.order)


def _explicit_zeros(weight: QuantisedWeight) -> Tensor:
    if weight.zeros is not None:
        return weight.zeros
    return torch.full(weight.scales.shape, 1 << (weight.bits - 1), dtype=torch.uint8, device=weight.device)


def quantise_activations(x: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    """Round the rows of x to 8 bits, symmetrically, with one scale per row and group of inputs.

    Args:
        x: [T, in].
        dtype: one of `LIMITS`; int8 is rounded to nearest, ties to even.
        group_size: inputs that share a scale; the last group may be short.

    Returns:
        [T, in] in `dtype` and scales [T, groups] float32: their product is x, but for rounding. A group of zeros has
        scale 1; one with NaN or infinity has that as its scale.
    """
    rows, inputs = x.shape
    limit = LIMITS[dtype]
    grouped = functional.pad(x.float(), (0, -inputs % group_size)).unflatten(1, (-1, group_size))
    peak = grouped.abs().amax(-1)
    scales = torch.where(peak == 0, 1.0, peak / limit)
    rounded = grouped / scales[..., None]
    if not dtype.is_floating_point:
        rounded = rounded.round()
    rounded = rounded.nan_to_num(0.0).clamp_(-limit, limit)
    return rounded.reshape(rows, -1)[:, :inputs].to(dtype), scales
