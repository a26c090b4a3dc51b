"""Products of activations and weights that both have 8 bits, on the matrix units for int8 and float8."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantised_weight import QuantisedWeight
from .activation import ACTIVATIONS
from .dot import INTERPRETED
from .quantised_activations import round_activations
from .tile_product import finish_tile
from .tuning import load_tuning

BLOCK_ROWS = ((16, 16), (32, 32), (64, 128), (128, None))
"""Rows of a tile, and up to how many rows they are used."""
MAX_SPLIT_ROWS = 64
"""With more rows there are tiles enough; partial sums would be much to write."""
LEAST_GROUP = 32
"""Inputs that a matrix unit takes at a time; groups are multiples of it."""
BLOCK_INPUTS = 128


@triton.jit
def _dot(a, b, acc):
    """acc + a b, in acc's dtype."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee").to(acc.dtype)
    return tl.dot(a, b, acc=acc, out_dtype=acc.dtype)


@triton.jit
def _add_block(y, x, weight, x_scales, scales_ptr, rows, GROUP: tl.constexpr, ACC: tl.constexpr):
    """y + the products of a block of inputs, times their scales if they have some of their own."""
    if GROUP:
        product = _dot(x, weight, tl.zeros(y.shape, ACC)).to(tl.float32)
        y += product * (x_scales[:, None] * tl.load(scales_ptr + rows).to(tl.float32)[None, :])
    elif ACC.is_fp32():
        # Hopper adds float8 products with fewer bits than float32 has: no more than a block's that way.
        y += _dot(x, weight, tl.zeros(y.shape, ACC))
    else:
        y = _dot(x, weight, y)
    return y


@triton.jit(do_not_specialize=["rows"])
def eight_bit_linear_kernel(
    x_ptr, x_scales_ptr, weight_ptr, scales_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr,
    rows, outputs, inputs, groups, out_stride, alpha,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, GROUP: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x weightᵀ. Program (tile, split of the inputs); the tiles of TOGETHER blocks of rows follow one another.

    Args:
        x_ptr: [rows, inputs] int8 or float8; x_scales_ptr: [rows, groups] float32.
        weight_ptr: [outputs, inputs] likewise, scales_ptr: [groups, outputs]; of 2 * outputs if GATED, gate first.
        GROUP: inputs that share a scale, whole blocks of BLOCK_K; 0: a row has one scale.
    See `finish_tile` for the other options.
    """
    pieces = tl.cdiv(outputs, BLOCK_N)
    row_blocks = tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0)
    first_row_block = tile // (TOGETHER * pieces) * TOGETHER
    within = tile % (TOGETHER * pieces)
    together = tl.minimum(row_blocks - first_row_block, TOGETHER)
    m = (first_row_block + within % together) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // together) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    valid = m < rows
    # Programs of the last piece read its last row again instead of testing every element.
    weight_rows = tl.minimum(n, outputs - 1).to(tl.int64)
    stride = 2 * outputs if GATED else outputs
    all_blocks = tl.cdiv(inputs, BLOCK_K)
    blocks = tl.cdiv(all_blocks, tl.num_programs(1))
    first = tl.program_id(1) * blocks
    last = tl.minimum(first + blocks, all_blocks)
    x_ptrs = x_ptr + m[:, None].to(tl.int64) * inputs + (first * BLOCK_K + k)[None, :]
    weight_ptrs = weight_ptr + weight_rows[None, :] * inputs + (first * BLOCK_K + k)[:, None]
    up_ptrs = weight_ptr + (weight_rows + outputs)[None, :] * inputs + (first * BLOCK_K + k)[:, None]
    INTEGER: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if GROUP else ACC)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if GROUP else ACC)
    for block in range(first, last):
        group = block * BLOCK_K // GROUP if GROUP else 0
        x_scales = tl.load(x_scales_ptr + m * groups + group, mask=valid, other=1.0) if GROUP else m
        block_scales = scales_ptr + group * stride
        if EVEN:
            x = tl.load(x_ptrs, mask=valid[:, None], other=0.0)
            weight = tl.load(weight_ptrs)
        else:
            inside = block * BLOCK_K + k < inputs
            x = tl.load(x_ptrs, mask=valid[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
        y = _add_block(y, x, weight, x_scales, block_scales, weight_rows, GROUP, ACC)
        if GATED:
            if EVEN:
                weight = tl.load(up_ptrs)
            else:
                weight = tl.load(up_ptrs, mask=inside[:, None], other=0.0)
            up = _add_block(up, x, weight, x_scales, block_scales, weight_rows + outputs, GROUP, ACC)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    y, up = y.to(tl.float32), up.to(tl.float32)
    if not GROUP:
        x_scales = tl.load(x_scales_ptr + m, mask=valid, other=1.0)[:, None]
        y *= x_scales * tl.load(scales_ptr + weight_rows).to(tl.float32)[None, :]
        if GATED:
            up *= x_scales * tl.load(scales_ptr + outputs + weight_rows).to(tl.float32)[None, :]
    finish_tile(
        y, up, m, n, bias_ptr, out_ptr, partial_ptr, arrived_ptr + tile, rows, outputs, out_stride, alpha,
        HAS_BIAS, ADD, GATED, ACTIVATION, SPLIT,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EightBitConfig:
    """How `eight_bit_linear_kernel` runs with tiles of so many rows."""

    block_n: int
    split_k: int
    warps: int
    stages: int


def candidates(block_m: int, outputs: int, inputs: int, *, gated: bool, processors: int) -> list[EightBitConfig]:
    """Configurations worth timing, the most promising first."""
    found = []
    for block_n, warps, stages in ((128, 8 if block_m == 128 else 4, 4), (64, 4, 4), (256, 8, 3), (32, 4, 5)):
        if gated:
            block_n //= 2
        if block_n > max(32, outputs):
            continue
        splits = {1}
        if block_m <= MAX_SPLIT_ROWS:
            most = max(1, inputs // (2 * BLOCK_INPUTS))
            pieces = triton.cdiv(outputs, block_n)
            splits = {max(1, min(most, round(processors * waves / pieces))) for waves in (1, 2, 4)}
        found += [EightBitConfig(block_n, split, warps, stages) for split in sorted(splits)]
    return found


def can_multiply(weight: QuantisedWeight, *, float8: bool) -> bool:
    """Whether the kernel takes a weight as it is.

    Args:
        float8: whether the GPU multiplies float8.
    """
    if weight.bits != 8 or weight.activations is None or weight.zeros is not None:
        return False
    if weight.is_float != weight.activations.is_floating_point or (weight.is_float and not float8):
        return False
    return weight.group_size >= weight.shape[1] or weight.group_size % LEAST_GROUP == 0


class EightBitProduct:
    """x weightᵀ + bias with x rounded to 8 bits, for any number of rows; gated if it has an activation."""

    def __init__(
        self,
        weight: QuantisedWeight,
        bias: Tensor | None,
        activation: str | None,
        configs: dict[int, EightBitConfig] | None = None,
    ) -> None:
        """`weight`: one that `can_multiply`; `configs`: by rows of a tile, instead of those in `tuning.json`."""
        assert weight.activations is not None
        self._values = weight.values.contiguous()
        if not weight.is_float:
            self._values = (self._values ^ 0x80).view(torch.int8)
        self._scales = weight.scales.t().contiguous()
        self._order, self._dtype, self._group_size = weight.order, weight.activations, weight.group_size
        self._bias, self._activation = bias, activation
        self.outputs = len(weight) // (1 if activation is None else 2)
        self._inputs = weight.shape[1]
        self._group = 0 if weight.group_size >= self._inputs else weight.group_size
        self._block_k = BLOCK_INPUTS if self._group == 0 else min(BLOCK_INPUTS, self._group & -self._group)
        tuning = load_tuning(weight.device)
        self._configs = configs or {
            rows: tuning.find(
                "eight_bit_linear" if activation is None else "eight_bit_gated_linear",
                EightBitConfig,
                {"values": "float8" if weight.is_float else "int8", "block_m": rows},
                {"outputs": self.outputs, "inputs": self._inputs},
            )
            for rows, _ in BLOCK_ROWS
        }
        most = max(
            triton.cdiv(self.outputs, config.block_n) * triton.cdiv(MAX_SPLIT_ROWS, rows)
            for rows, config in self._configs.items()
        )
        self._arrived = torch.zeros(most, dtype=torch.int32, device=weight.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return self._values.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor, out: Tensor, alpha: float | None = None) -> None:
        """The product into `out` [T, outputs], or added to it times `alpha`."""
        rows = len(x)
        rounded, scales = round_activations(x, self._dtype, self._group_size, order=self._order)
        block_m = next(size for size, most in BLOCK_ROWS if most is None or rows <= most)
        config = self._configs[block_m]
        gated = self._activation is not None
        splits = min(config.split_k, triton.cdiv(self._inputs, self._block_k)) if rows <= MAX_SPLIT_ROWS else 1
        partial = out
        if splits > 1:
            planes = 2 if gated else 1
            partial = torch.empty(splits, planes, rows, self.outputs, dtype=torch.float32, device=x.device)
        tiles = triton.cdiv(self.outputs, config.block_n) * triton.cdiv(rows, block_m)
        eight_bit_linear_kernel[(tiles, splits)](
            rounded, scales, self._values, self._scales, out if self._bias is None else self._bias, out, partial,
            self._arrived, rows, self.outputs, self._inputs, scales.shape[1], out.stride(0),
            1.0 if alpha is None else alpha,
            HAS_BIAS=self._bias is not None, ADD=alpha is not None,
            GATED=gated, ACTIVATION=0 if self._activation is None else ACTIVATIONS[self._activation],
            SPLIT=splits > 1, EVEN=self._inputs % self._block_k == 0, GROUP=self._group, TOGETHER=8,
            BLOCK_M=block_m, BLOCK_N=config.block_n, BLOCK_K=self._block_k,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
