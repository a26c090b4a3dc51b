"""The order in which the compiled product reads a weight: `kernels/native/linear.h` draws it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .huge_pages import Arena

LANES = 16
BLOCKS = 4
GROUP = BLOCKS * LANES


def pack(weight: Tensor, arena: Arena | None = None) -> Tensor:
    """[out, in] bfloat16 or float32 → the same numbers as one flat stream, padded with zeros to whole blocks.

    Args:
        arena: where its memory comes from.
    """
    weight = _padded(weight)
    rows, inputs = weight.shape
    pair = inputs_per_step(weight.dtype)
    packed = (arena or Arena()).zeros(weight.numel(), weight.dtype)
    whole = rows // GROUP * GROUP
    for begin, end in ((0, whole), (whole, rows)):
        if begin == end:
            continue
        blocks = BLOCKS if begin == 0 and whole else (end - begin) // LANES
        source = weight[begin:end].view(-1, blocks, LANES, inputs // pair, pair).permute(0, 3, 1, 2, 4)
        packed[begin * inputs : end * inputs].view(source.shape).copy_(source)
    return packed


def interleave_gate(weight: Tensor) -> Tensor:
    """[2 * width, …] with all of the gate first → the gate and up in turn, as many rows as half a group has, so that a
    group has both; zeros make the width whole blocks."""
    gate, up = weight.unflatten(0, (2, -1)).unbind()
    missing = -len(gate) % LANES
    if missing:
        gate, up = (torch.cat((half, half.new_zeros(missing, *half.shape[1:]))) for half in (gate, up))
    pieces = [piece for pair in zip(gate.split(GROUP // 2), up.split(GROUP // 2), strict=True) for piece in pair]
    return torch.cat(pieces)


def unpack_rows(packed: Tensor, rows: Tensor, num_rows: int, inputs: int) -> Tensor:
    """Rows [R] int64 of a weight [num_rows, inputs] that was packed: [R, inputs], a new tensor.

    Raises:
        IndexError: there is no such row.
    """
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
        raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a weight with {num_rows} rows")
    pair = inputs_per_step(packed.dtype)
    steps = -(-inputs // pair)
    whole = num_rows // GROUP * GROUP
    stream = steps * pair
    result = packed.new_empty(len(rows), stream)
    for begin, end in ((0, whole), (whole, -(-num_rows // LANES) * LANES)):
        if begin == end:
            continue
        blocks = BLOCKS if begin == 0 and whole else (end - begin) // LANES
        view = packed[begin * stream : end * stream].view(-1, steps, blocks, LANES, pair).permute(0, 2, 3, 1, 4)
        inside = (rows >= begin) & (rows < end)
        every = whole == num_rows or bool(inside.all())
        local = (rows if every else rows[inside]) - begin
        found = view[local // (blocks * LANES), local // LANES % blocks, local % LANES].flatten(1)
        if every:
            return found[:, :inputs].contiguous()
        result[inside] = found
    return result[:, :inputs].contiguous()


def inputs_per_step(dtype: torch.dtype) -> int:
    """Inputs that lie together: two bfloat16 make a lane."""
    return 2 if dtype == torch.bfloat16 else 1


def _padded(weight: Tensor) -> Tensor:
    rows, inputs = weight.shape
    right, below = -inputs % inputs_per_step(weight.dtype), -rows % LANES
    return functional.pad(weight, (0, right, 0, below)) if right or below else weight.contiguous()
