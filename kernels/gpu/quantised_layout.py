"""How a quantised weight lies in a GPU's memory, and its expansion for products of many rows.

A matrix unit takes PART inputs at a time. With 4 bits, the low halves of PART bytes are PART inputs and the high halves
the PART inputs behind them, so that both halves of a tile of bytes are operands as they come:

    inputs    0 … 63 │ 64 … 127 │ 128 … 191 │ 192 … 255
    bytes     0 … 63, low │ high │ 64 … 127, low │ high

Scales and zeros are transposed, [groups, out], because a program needs those of neighbouring rows.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantised_weight import QuantisedWeight
from .quantised_tile import BLOCK_INPUTS
from .unpack import unpack_bytes, unpack_nibbles

LEAST_PART = 16
"""The fewest inputs that a matrix unit takes."""
WORKSPACE_BYTES = 32 * 2**20
"""Of an expanded weight, so many at a time: they stay in the device's cache until they are multiplied."""
_BLOCK_ROWS = 32


@triton.jit
def dequantise_kernel(
    values_ptr, scales_ptr, zeros_ptr, out_ptr, rows, inputs, row_bytes, first_row, stride,
    BITS: tl.constexpr, FLOAT: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """out [rows, inputs] = rows from first_row on of a packed weight. Program (PART bytes of a row, block of rows)."""
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = (row < rows)[:, None]
    column = tl.arange(0, PART)
    weight_row = tl.minimum(first_row + row, stride - 1)
    positions = weight_row.to(tl.int64)[:, None] * row_bytes + (tl.program_id(0) * PART + column)[None, :]
    packed = tl.load(values_ptr + positions)
    halves: tl.constexpr = 8 // BITS
    k = tl.program_id(0) * halves * PART + column
    low_at = _group_of(k, inputs, GROUP)[None, :] * stride + weight_row[:, None]
    high_at = _group_of(k + PART, inputs, GROUP)[None, :] * stride + weight_row[:, None]
    zero = 8.0 if BITS == 4 else 128.0
    high_zero = zero
    if ZEROS:
        zero = tl.load(zeros_ptr + low_at).to(tl.float32)
        high_zero = tl.load(zeros_ptr + high_at).to(tl.float32)
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * inputs + k[None, :]
    dtype = out_ptr.dtype.element_ty
    scale = tl.load(scales_ptr + low_at).to(tl.float32)
    if BITS == 4:
        low, high = unpack_nibbles(packed, zero, high_zero, tl.float32)
        high *= tl.load(scales_ptr + high_at).to(tl.float32)
        tl.store(out_ptrs + PART, high.to(dtype), mask=valid & (k + PART < inputs)[None, :])
    else:
        low = unpack_bytes(packed, zero, FLOAT, tl.float32)
    tl.store(out_ptrs, (low * scale).to(dtype), mask=valid & (k < inputs)[None, :])


@triton.jit
def _group_of(k, inputs, GROUP: tl.constexpr):
    """The group of every input; the last one's for those behind the end."""
    if GROUP:
        return tl.minimum(k, inputs - 1) // GROUP
    return k * 0


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeight:
    """A `QuantisedWeight` as the kernels read it."""

    values: Tensor
    """[out, bytes] uint8."""
    scales: Tensor
    """[groups, out]."""
    zeros: Tensor | None
    """[groups, out] uint8."""
    inputs: int
    """Columns of the weight."""
    bits: int
    is_float: bool
    group: int
    """Inputs that share a scale; 0: a row has one."""
    part: int
    """See above; less than `LEAST_PART`: the groups are such that no product is made of this."""

    @property
    def outputs(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(part.nbytes for part in (self.values, self.scales, self.zeros) if part is not None)

    def dequantise(self, first: int, last: int, out: Tensor) -> Tensor:
        """Rows first to last in out's dtype; `out` has room for them, and the result [last - first, in] lies in it."""
        out = out[: (last - first) * self.inputs].view(last - first, self.inputs)
        part = max(self.part, LEAST_PART)
        dequantise_kernel[(triton.cdiv(self.values.shape[1], part), triton.cdiv(last - first, _BLOCK_ROWS))](
            self.values, self.scales, self.scales if self.zeros is None else self.zeros, out,
            last - first, self.inputs, self.values.shape[1], first, self.outputs,
            BITS=self.bits, FLOAT=self.is_float, ZEROS=self.zeros is not None, GROUP=self.group, PART=part,
            BLOCK_ROWS=_BLOCK_ROWS, num_warps=4,
        )  # fmt: skip
        return out


def pack(weight: QuantisedWeight) -> PackedWeight:
    """The weight as the kernels read it; `order` and `activations` are the caller's."""
    inputs = weight.shape[1]
    group = 0 if weight.group_size >= inputs else weight.group_size
    most = BLOCK_INPUTS * weight.bits // 8
    part = most if group == 0 else min(most, group & -group)
    padding = -inputs % BLOCK_INPUTS
    # Four bits are paired anew, part by part.
    values = weight.values.view(torch.uint8)
    if weight.bits == 4:
        values = torch.nn.functional.pad(weight.integers(), (0, padding))
        halves = values.unflatten(1, (-1, 2, max(part, LEAST_PART)))
        values = (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)
    elif padding:
        values = torch.nn.functional.pad(values, (0, padding))
    return PackedWeight(
        values=values.contiguous(),
        scales=weight.scales.t().contiguous(),
        zeros=None if weight.zeros is None else weight.zeros.t().contiguous(),
        inputs=inputs,
        bits=weight.bits,
        is_float=weight.is_float,
        group=group,
        part=part,
    )


class Workspace:
    """Where weights are expanded, a piece at a time: memory that all products of a decoder share."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def reserve(self, weight: PackedWeight) -> int:
        """Make room for some rows of a weight; returns how many."""
        memory = self._memory
        rows = min(weight.outputs, max(1, WORKSPACE_BYTES // (weight.inputs * memory.itemsize)))
        if rows * weight.inputs > len(memory):
            self._memory = memory.new_empty(rows * weight.inputs)
        return rows

    @property
    def memory(self) -> Tensor:
        """One dimension, in the dtype of activations."""
        return self._memory
