"""The form in which the compiled product reads a weight: `native/linear.h` and `native/compressed_weight.h` draw it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from . import native_library
from .huge_pages import Arena

LANES = 16
BLOCKS = 4
GROUP = BLOCKS * LANES
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

    Args:
        arena: where its memory comes from.
        compress: leave out the bits of bfloat16 exponents that carry nothing, if there are enough. Nothing is lost.
    """
    arena = arena or Arena()
    shape = (weight.shape[0], weight.shape[1])
    pair = inputs_per_step(weight.dtype)
    weight = functional.pad(weight, (0, -shape[1] % pair, 0, -shape[0] % GROUP))
    source = weight.view(-1, BLOCKS, LANES, weight.shape[1] // pair, pair).permute(0, 3, 1, 2, 4)
    if compress and weight.dtype == torch.bfloat16:
        compressed = _compress(source.contiguous(), arena)
        if compressed is not None:
            return PackedWeight(compressed, weight.dtype, shape, compressed=True)
    data = arena.zeros(weight.numel(), weight.dtype)
    data.view(source.shape).copy_(source)
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


def _compress(packed: Tensor, arena: Arena) -> Tensor | None:
    """[groups, steps, BLOCKS, LANES, 2] → bytes; None if they are hardly fewer."""
    places = native_library.compressed_places(packed)
    size = int(places[-1])
    if size > WORTH_WHILE * packed.nbytes:
        return None
    target = arena.zeros(size, torch.uint8)
    native_library.compress(packed, places, target)
    return target
