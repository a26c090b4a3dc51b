"""The form in which the compiled product reads a weight: `native/linear.h` and `native/compressed_weight.h` draw it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from . import native_library
from .huge_pages import ALIGNMENT, Arena

LANES = 16
BLOCKS = 4
GROUP = BLOCKS * LANES
PART_BYTES = 8 * 2**20
"""What is packed at a time."""
WORTH_WHILE = 0.9
"""Of its size; a compressed weight that is not smaller than this is kept as it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [out, in] as a stream."""

    data: Tensor
    """[N], of `dtype`; bytes if it is compressed."""
    dtype: torch.dtype
    shape: tuple[int, int]
    """(out, in), without what was added to fill groups."""
    compressed: bool


def pack(weight: Tensor, arena: Arena | None = None, *, compress: bool = False) -> PackedWeight:
    """[out, in] bfloat16 or float32 → the same numbers as one stream, padded with zeros to whole groups.

    Beside the weight and the result there are never more than some megabytes.

    Args:
        arena: where its memory comes from.
        compress: leave out the bits of bfloat16 exponents that carry nothing, if there are enough. Nothing is lost.
    """
    arena = arena or Arena()
    shape = (weight.shape[0], weight.shape[1])
    if compress and weight.dtype == torch.bfloat16:
        compressed = _compress(weight, arena)
        if compressed is not None:
            return PackedWeight(compressed, weight.dtype, shape, compressed=True)
    group_size = GROUP * _padded_inputs(weight)
    data = arena.zeros(-(-shape[0] // GROUP) * group_size, weight.dtype)
    for first, part in _parts(weight):
        data[first * group_size :][: part.numel()].view(part.shape).copy_(part)
    return PackedWeight(data, weight.dtype, shape, compressed=False)


def interleave_gate(weight: Tensor) -> Tensor:
    """[2 * width, …] with all of the gate first → the gate and up in turn, half a group of each; zeros make whole
    groups."""
    gate, up = weight.unflatten(0, (2, -1)).unbind()
    missing = -len(gate) % (GROUP // 2)
    if missing:
        gate, up = (torch.cat((half, half.new_zeros(missing, *half.shape[1:]))) for half in (gate, up))
    pieces = [piece for pair in zip(gate.split(GROUP // 2), up.split(GROUP // 2), strict=True) for piece in pair]
    return torch.cat(pieces)


def inputs_per_step(dtype: torch.dtype) -> int:
    """Inputs that lie together: two bfloat16 make a lane."""
    return 2 if dtype == torch.bfloat16 else 1


def _padded_inputs(weight: Tensor) -> int:
    pair = inputs_per_step(weight.dtype)
    return -(-weight.shape[1] // pair) * pair


def _parts(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The groups of a weight, some at a time: the number of the first, and [groups, steps, BLOCKS, LANES, pair]."""
    pair, inputs = inputs_per_step(weight.dtype), _padded_inputs(weight)
    groups = max(1, PART_BYTES // (GROUP * inputs * weight.dtype.itemsize))
    for first in range(0, -(-len(weight) // GROUP), groups):
        part = weight[first * GROUP : (first + groups) * GROUP]
        missing = (0, inputs - part.shape[1], 0, -len(part) % GROUP)
        part = functional.pad(part, missing) if any(missing) else part
        yield first, part.reshape(-1, BLOCKS, LANES, inputs // pair, pair).permute(0, 3, 1, 2, 4)


def _compress(weight: Tensor, arena: Arena) -> Tensor | None:
    """[out, in] → bytes; None if they are hardly fewer."""
    sizes = torch.cat([native_library.compressed_sizes(part.contiguous()) for _, part in _parts(weight)])
    index_size = -(-(len(sizes) + 1) * 8 // ALIGNMENT) * ALIGNMENT
    places = functional.pad(sizes.cumsum(0), (1, 0)) + index_size
    size = int(places[-1])
    if size > WORTH_WHILE * len(sizes) * GROUP * _padded_inputs(weight) * weight.dtype.itemsize:
        return None
    target = arena.zeros(size, torch.uint8)
    target[: places.nbytes].view(torch.int64).copy_(places)
    for first, part in _parts(weight):
        native_library.compress(part.contiguous(), places[first:], target)
    return target
