"""Products with quantised weights: activations stay as they are, weights are unpacked in registers.

With few rows all the time goes into reading the weight, which four bits make a quarter of. With many, the weight is
expanded piece by piece (`quantised_layout.py`) and the library multiplies: then a product is bound by the matrix units,
which would wait for the unpacking if every tile of rows did it anew.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import ACTIVATIONS, gated_activation
from .quantised_layout import LEAST_PART, PackedWeight, Workspace
from .quantised_tile import BLOCK_INPUTS, multiply_quantised_tile
from .tile_product import finish_tile
from .tuning import dtype_name, load_tuning

MAX_ROWS = 64
"""The most rows of one launch."""
MAX_BLOCK_ROWS = 32
"""Of a tile. Hopper's instruction for 64 rows wants the weight in shared memory: unpacked there, it would be written
and read once more, in 16 bits."""


@triton.jit(do_not_specialize=["rows"])
def few_rows_quantised_kernel(
    x_ptr, values_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr,
    rows, outputs, inputs, row_bytes, groups, x_stride, out_stride, alpha,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, BLOCK_INPUTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x weightᵀ. Program (tile, split of the inputs); tiles of the same outputs follow one another.

    See `finish_tile` for the options, `multiply_quantised_tile` for the weight: with GATED it has 2 * outputs rows,
    gate first, and a program multiplies with both that make one output.
    """
    row_blocks = tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0)
    m = (tile % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Programs of the last piece read its last row again instead of testing every element.
    weight_rows = tl.minimum(n, outputs - 1).to(tl.int64)
    all_blocks = tl.cdiv(inputs, BLOCK_INPUTS)
    blocks = tl.cdiv(all_blocks, tl.num_programs(1))
    first = tl.program_id(1) * blocks
    valid = m < rows
    y, up = multiply_quantised_tile(
        x_ptr + m[:, None].to(tl.int64) * x_stride, valid, values_ptr, scales_ptr, zeros_ptr,
        weight_rows, weight_rows + outputs, row_bytes, groups, 2 * outputs if GATED else outputs,
        first, tl.minimum(first + blocks, all_blocks), inputs,
        GATED, EVEN, BITS, FLOAT, ZEROS, GROUP, PART, BLOCK_INPUTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    finish_tile(
        y, up, m, n, bias_ptr, out_ptr, partial_ptr, arrived_ptr + tile, rows, outputs, out_stride, alpha,
        HAS_BIAS, ADD, GATED, ACTIVATION, SPLIT,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class QuantisedConfig:
    """How `few_rows_quantised_kernel` runs."""

    block_n: int
    split_k: int
    warps: int
    stages: int
    max_rows: int
    """More rows are the library's; 0: all are."""


def candidates(outputs: int, inputs: int, *, gated: bool, processors: int) -> list[QuantisedConfig]:
    """Configurations worth timing, the most promising first; their `max_rows` is the most that the kernel takes.

    Args:
        processors: multiprocessors of the GPU.
    """
    found = []
    for block_n, warps, stages in ((128, 4, 4), (64, 4, 4), (128, 4, 6), (64, 2, 5), (128, 8, 4), (32, 2, 6)):
        if gated:
            block_n //= 2
        if block_n > max(32, outputs):
            continue
        pieces = triton.cdiv(outputs, block_n)
        # One, two or four programs per multiprocessor, of at least two blocks each.
        most = max(1, inputs // (2 * BLOCK_INPUTS))
        splits = {max(1, min(most, round(processors * waves / pieces))) for waves in (1, 2, 4)}
        found += [QuantisedConfig(block_n, split, warps, stages, MAX_ROWS) for split in sorted(splits)]
    return found


def block_rows(rows: int) -> int:
    """Rows of a tile."""
    return min(MAX_BLOCK_ROWS, max(16, triton.next_power_of_2(rows)))


class QuantisedProduct:
    """x weightᵀ + bias with a packed weight, for any number of rows; gated if it has an activation."""

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None,
        activation: str | None,
        workspace: Workspace,
        config: QuantisedConfig | None = None,
    ) -> None:
        """`config`: instead of the one in `tuning.json`."""
        self._weight, self._bias, self._activation, self._workspace = weight, bias, activation, workspace
        self.outputs = weight.outputs // (1 if activation is None else 2)
        device = weight.values.device
        sizes = {"outputs": self.outputs, "inputs": weight.inputs}
        exact: dict[str, str | int] = {"dtype": dtype_name(workspace.memory.dtype), "bits": weight.bits}
        self._config = config or load_tuning(device).find(
            "quantised_linear" if activation is None else "quantised_gated_linear", QuantisedConfig, exact, sizes
        )
        self.max_rows = min(MAX_ROWS, self._config.max_rows) if weight.part >= LEAST_PART else 0
        self._splits = min(self._config.split_k, triton.cdiv(weight.inputs, BLOCK_INPUTS))
        self._pieces = triton.cdiv(self.outputs, self._config.block_n)
        self._arrived = torch.zeros(self._pieces * (MAX_ROWS // MAX_BLOCK_ROWS), dtype=torch.int32, device=device)
        self._expanded_rows = workspace.reserve(weight)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self._weight.nbytes

    def __call__(self, x: Tensor, out: Tensor, alpha: float | None = None) -> None:
        """The product into `out` [T, outputs], or added to it times `alpha`."""
        if len(x) <= self.max_rows:
            self._few_rows(x, out, alpha)
        elif self._activation is not None:
            y = x.new_empty(len(x), self._weight.outputs)
            self._many_rows(x, y, None)
            out.copy_(gated_activation(y, self._activation))
        else:
            self._many_rows(x, out, alpha)

    def _few_rows(self, x: Tensor, out: Tensor, alpha: float | None) -> None:
        weight, config, rows = self._weight, self._config, len(x)
        assert x.stride(1) == out.stride(1) == 1
        gated = self._activation is not None
        partial = out
        if self._splits > 1:
            planes = 2 if gated else 1
            partial = torch.empty(self._splits, planes, rows, self.outputs, dtype=torch.float32, device=x.device)
        block_m = block_rows(rows)
        few_rows_quantised_kernel[(self._pieces * triton.cdiv(rows, block_m), self._splits)](
            x, weight.values, weight.scales, weight.scales if weight.zeros is None else weight.zeros,
            out if self._bias is None else self._bias, out, partial, self._arrived,
            rows, self.outputs, weight.inputs, weight.values.shape[1], len(weight.scales), x.stride(0), out.stride(0),
            1.0 if alpha is None else alpha,
            HAS_BIAS=self._bias is not None, ADD=alpha is not None,
            GATED=gated, ACTIVATION=0 if self._activation is None else ACTIVATIONS[self._activation],
            SPLIT=self._splits > 1, EVEN=weight.inputs % BLOCK_INPUTS == 0,
            BITS=weight.bits, FLOAT=weight.is_float, ZEROS=weight.zeros is not None, GROUP=weight.group,
            PART=weight.part, BLOCK_INPUTS=BLOCK_INPUTS, BLOCK_M=block_m, BLOCK_N=config.block_n,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def _many_rows(self, x: Tensor, out: Tensor, alpha: float | None) -> None:
        for first in range(0, self._weight.outputs, self._expanded_rows):
            last = min(first + self._expanded_rows, self._weight.outputs)
            weight = self._weight.dequantise(first, last, self._workspace.memory).t()
            bias = None if self._bias is None else self._bias[first:last]
            part = out[:, first:last]
            if alpha is not None:
                part.addmm_(x, weight, alpha=alpha)
                if bias is not None:
                    part.add_(bias, alpha=alpha)
            elif out.dtype != x.dtype:
                part.copy_(wide_product(x, weight))
                if bias is not None:
                    part.add_(bias)
            elif bias is not None:
                torch.addmm(bias, x, weight, out=part)
            else:
                torch.mm(x, weight, out=part)


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight in float32, not rounded to their dtype on a GPU."""
    if x.device.type == "cuda":
        return torch.mm(x, weight, out_dtype=torch.float32)
    return torch.mm(x, weight).float()
