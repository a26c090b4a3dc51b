"""The form in which the compiled product reads a quantised weight: `native/quantised_linear.h` draws it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from .huge_pages import Arena
from .packed_weight import BLOCKS, GROUP, LANES, PART_BYTES, interleave_gate
from .quantised_weight import QuantisedWeight, unpack_nibbles

UNIT = 8
"""A group has whole multiples of so many inputs: a step of 4 bits."""
QUAD = 4
"""Inputs that meet a lane at once."""
FINE_GROUP = 128
"""Groups of x that the kernel may choose have at most so many inputs, as finer scales lose less."""
WHOLE_ROW_GROUP = 2048
"""Where a row of x has one scale, up to so many inputs are summed as integers."""
SCALE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`enum ScaleKind`."""


@dataclasses.dataclass(frozen=True, slots=True)
class QuantisedStream:
    """A quantised weight as the kernel reads it."""

    data: Tensor
    """[N] uint8."""
    shape: tuple[int, int]
    """(out, in), without what was added to fill pieces and groups."""
    padded_inputs: int
    """Inputs of all groups."""
    group_size: int
    bits: int
    scale_kind: int
    has_zeros: bool
    row_scale: bool
    """A row of x has one scale, not one per group."""
    order: Tensor | None
    """[padded_inputs] int32: the input of x that each column meets, -1 for none."""

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.padded_inputs // self.group_size


def can_stream(weight: QuantisedWeight) -> bool:
    """Whether the compiled product reads this weight."""
    return not weight.is_float and (weight.group_size == weight.shape[1] or weight.group_size % UNIT == 0)


def make_stream(weight: QuantisedWeight, arena: Arena | None = None, *, gated: bool = False) -> QuantisedStream:
    """The same numbers as one stream. Beside the weight and the result there are never more than some megabytes.

    Args:
        arena: where its memory comes from.
        gated: the weight is [2 * width, in], gate first; its rows are interleaved as `interleave_gate` does.
    """
    assert can_stream(weight)
    parts, group_size, repeats = _groups(weight)
    padded_inputs = parts * group_size
    scales, zeros = (_of_parts(of_groups, parts, repeats) for of_groups in (weight.scales, weight.zeros))
    assert scales is not None
    values = weight.values
    if gated:
        values, scales = interleave_gate(values), interleave_gate(scales)
        zeros = None if zeros is None else interleave_gate(zeros)
    pieces = -(-len(values) // GROUP)
    step_inputs = QUAD * (2 if weight.bits == 4 else 1)
    scale_bytes = GROUP * scales.dtype.itemsize
    group_bytes = group_size // step_inputs * BLOCKS * LANES * QUAD + scale_bytes + (0 if zeros is None else GROUP)
    data = (arena or Arena()).zeros(pieces * parts * group_bytes, torch.uint8)
    target = data.view(pieces, parts, group_bytes)
    at_once = max(1, PART_BYTES // (GROUP * padded_inputs))
    for first in range(0, pieces, at_once):
        rows = slice(first * GROUP, (first + at_once) * GROUP)
        part = target[first : first + at_once]
        steps = _steps(values[rows], weight.bits, padded_inputs, group_size)
        part[:, :, : steps.shape[2]] = steps
        of_scales = _by_piece(scales[rows])
        part[:, :, steps.shape[2] :][:, :, :scale_bytes] = of_scales.view(torch.uint8)
        if zeros is not None:
            part[:, :, -GROUP:] = _by_piece(zeros[rows])
    return QuantisedStream(
        data,
        weight.shape,
        padded_inputs,
        group_size,
        weight.bits,
        SCALE_KINDS[scales.dtype],
        zeros is not None,
        _has_row_scale(weight),
        None if weight.order is None else _padded_order(weight.order, padded_inputs),
    )


def _has_row_scale(weight: QuantisedWeight) -> bool:
    """Whether the checkpoint wants what the kernel can do: int8 with one scale for a row of x. Where it wants floats of
    8 bits, finer scales are nearer to them."""
    return weight.activations == torch.int8 and weight.scales.shape[1] == 1


def _groups(weight: QuantisedWeight) -> tuple[int, int, int]:
    """(groups, inputs of each, into how many each group of the weight was divided)."""
    inputs, size = weight.shape[1], weight.group_size
    if weight.scales.shape[1] == 1:
        parts = -(-inputs // (WHOLE_ROW_GROUP if _has_row_scale(weight) else FINE_GROUP))
        return parts, -(-inputs // (parts * UNIT)) * UNIT, parts
    divided = 1
    if weight.activations is None:  # else the checkpoint says which inputs share a scale
        divided = next(
            n for n in range(1, size + 1) if size % (n * UNIT) == 0 and (size // n <= FINE_GROUP or n == size // UNIT)
        )
    return weight.scales.shape[1] * divided, size // divided, divided


def _of_parts(of_groups: Tensor | None, parts: int, repeats: int) -> Tensor | None:
    """[out, groups of the weight] → [out, parts]."""
    return None if of_groups is None else of_groups.repeat_interleave(repeats, 1)[:, :parts].contiguous()


def _steps(values: Tensor, bits: int, padded_inputs: int, group_size: int) -> Tensor:
    """Rows of a weight's values → [pieces, groups, bytes of a group's steps]."""
    integers = unpack_nibbles(values) if bits == 4 else values
    integers = functional.pad(integers, (0, padded_inputs - integers.shape[1], 0, -len(integers) % GROUP))
    halves = 2 if bits == 4 else 1
    quads = integers.view(-1, BLOCKS, LANES, padded_inputs // group_size, group_size // (halves * QUAD), halves, QUAD)
    quads = quads.permute(0, 3, 4, 1, 2, 6, 5)  # piece, group, step, block, column, input, half
    packed = quads[..., 0] | (quads[..., 1] << 4) if bits == 4 else quads[..., 0]
    return packed.flatten(2)


def _by_piece(of_groups: Tensor) -> Tensor:
    """Rows of [out, groups] → [pieces, groups, GROUP]."""
    padded = functional.pad(of_groups, (0, 0, 0, -len(of_groups) % GROUP))
    return padded.view(-1, GROUP, padded.shape[1]).transpose(1, 2).contiguous()


def _padded_order(order: Tensor, padded_inputs: int) -> Tensor:
    return functional.pad(order.int(), (0, padded_inputs - len(order)), value=-1)
