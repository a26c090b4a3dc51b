"""Matrix products for few rows, which are bound by reading the weight; products for many rows are the library's.

Where a decode step multiplies a few rows with a weight, all the time goes into reading the weight from memory once. The
kernel keeps many wide reads in flight on every multiprocessor. Rows are padded to a tensor-core tile of 16; that is
arithmetic which costs nothing here. Where a weight has too few rows for every multiprocessor to get a tile, its columns
are split among programs (`tile_product.py`).
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ..linear import PlainLinear
from .activation import ACTIVATIONS, gated_activation
from .tile_product import finish_tile, multiply_tile
from .tuning import dtype_name, load_tuning


@triton.jit(do_not_specialize=["rows"])
def few_rows_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr, rows, outputs, inputs, x_stride, out_stride, alpha,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x weightᵀ for up to BLOCK_M rows. Program (piece of the outputs, split of the inputs).

    GATED: the weight has 2 * outputs rows, gate first, and a program multiplies with both that make one output.
    ADD: out += alpha * y. EVEN: the inputs are whole blocks. partial_ptr: [splits, 1 or 2 if gated, rows, outputs]
    float32; arrived_ptr: one zero per piece of the outputs, zero again afterwards.
    """
    piece = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    n = piece * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Programs of the last piece read its last row again instead of testing every element.
    weight_rows = tl.minimum(n, outputs - 1).to(tl.int64)
    blocks = tl.cdiv(tl.cdiv(inputs, BLOCK_K), tl.num_programs(1))
    first = tl.program_id(1) * blocks * BLOCK_K
    last = tl.minimum(inputs, first + blocks * BLOCK_K)
    x_ptrs = x_ptr + m[:, None].to(tl.int64) * x_stride + (first + k)[None, :]
    weight_ptrs = weight_ptr + weight_rows[None, :] * inputs + (first + k)[:, None]
    up_ptrs = weight_ptr + (weight_rows + outputs)[None, :] * inputs + (first + k)[:, None]
    y, up = multiply_tile(
        x_ptrs, m < rows, weight_ptrs, up_ptrs, k, first, last, inputs, GATED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K
    )

    finish_tile(
        y, up, m, n, bias_ptr, out_ptr, partial_ptr, arrived_ptr + piece, rows, outputs, out_stride, alpha,
        HAS_BIAS, ADD, GATED, ACTIVATION, SPLIT,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """How `few_rows_linear_kernel` runs."""

    block_n: int
    block_k: int
    split_k: int
    warps: int
    stages: int
    max_rows: int
    """More rows are the library's; 0: all are."""


def candidates(outputs: int, inputs: int, dtype: torch.dtype, *, gated: bool, processors: int) -> list[LinearConfig]:
    """Configurations worth timing, the most promising first; their `max_rows` is the most that the kernel takes.

    Args:
        processors: multiprocessors of the GPU.
    """
    found = []
    wide = 4 if dtype.itemsize == 4 else 2
    for block_n, block_k, warps, stages in (
        (64, 128, 4, 4), (32, 256, 4, 4), (128, 64, 4, 5), (64, 256, 4, 3), (32, 128, 4, 6), (128, 128, 8, 4),
        (16, 256, 4, 5), (16, 512, 4, 3), (64, 64, 4, 6),
    ):  # fmt: skip
        block_k = block_k * 2 // wide
        if block_n > max(16, outputs) or (gated and block_n * block_k * stages > 2**15):
            continue
        pieces = triton.cdiv(outputs, block_n)
        # One, two or four programs per multiprocessor, of at least two blocks each.
        splits = {max(1, min(inputs // (2 * block_k), round(processors * waves / pieces))) for waves in (1, 2, 4)}
        found += [LinearConfig(block_n, block_k, split, warps, stages, MAX_ROWS) for split in sorted(splits)]
    return found


MAX_ROWS = 64
"""The most rows of one launch; with more, a product is no longer bound by reading the weight."""


class _FewRows:
    """A launch of the kernel for one weight."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: str | None, config: LinearConfig | None
    ) -> None:
        assert weight.is_contiguous()
        self._weight, self._bias, self._activation = weight, bias, activation
        self._outputs, self._inputs = len(weight) // (1 if activation is None else 2), weight.shape[1]
        self._config = config or load_tuning(weight.device).find(
            "linear" if activation is None else "gated_linear",
            LinearConfig,
            {"dtype": dtype_name(weight.dtype)},
            {"outputs": self._outputs, "inputs": self._inputs},
        )
        self.max_rows = min(MAX_ROWS, self._config.max_rows)
        self._splits = min(self._config.split_k, triton.cdiv(self._inputs, self._config.block_k))
        self._pieces = triton.cdiv(self._outputs, self._config.block_n)
        self._arrived = torch.zeros(self._pieces, dtype=torch.int32, device=weight.device)

    def __call__(self, x: Tensor, out: Tensor, alpha: float | None = None) -> Tensor:
        """The product into `out` [T, outputs], or added to it times `alpha`; T is at most `max_rows`."""
        config = self._config
        rows = len(x)
        assert rows <= MAX_ROWS
        assert x.stride(1) == out.stride(1) == 1
        gated = self._activation is not None
        partial = out
        if self._splits > 1:
            planes = 2 if gated else 1
            partial = torch.empty(self._splits, planes, rows, self._outputs, dtype=torch.float32, device=x.device)
        few_rows_linear_kernel[(self._pieces, self._splits)](
            x, self._weight, self._weight if self._bias is None else self._bias, out, partial, self._arrived,
            rows, self._outputs, self._inputs, x.stride(0), out.stride(0), 1.0 if alpha is None else alpha,
            HAS_BIAS=self._bias is not None, ADD=alpha is not None,
            GATED=gated, ACTIVATION=0 if self._activation is None else ACTIVATIONS[self._activation],
            SPLIT=self._splits > 1, EVEN=self._inputs % config.block_k == 0,
            BLOCK_M=max(16, triton.next_power_of_2(rows)), BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return out


class TritonLinear(PlainLinear):
    """See `interface.Linear`; few rows by our kernel and many by torch's library, as `tuning.json` says.

    A step's launches must follow one another: two that run at once would take each other's partial sums.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, config: LinearConfig | None = None) -> None:
        """`weight` [out, in], `bias` [out]; `config`: instead of the one in `tuning.json`."""
        super().__init__(weight, bias)
        self._few_rows = _FewRows(weight, bias, None, config)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= self._few_rows.max_rows:
            return self._few_rows(x, x.new_empty(len(x), len(self.weight)))
        return super().__call__(x)

    def float32(self, x: Tensor) -> Tensor:
        """See `interface.Linear`; never rounded to x's dtype on a GPU."""
        if len(x) <= self._few_rows.max_rows:
            return self._few_rows(x, x.new_empty(len(x), len(self.weight), dtype=torch.float32))
        if x.device.type == "cuda" and x.dtype != torch.float32:
            y = torch.mm(x, self.weight.t(), out_dtype=torch.float32)
            return y if self._bias is None else y.add_(self._bias)
        return super().float32(x)

    def add_to(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """See `interface.Linear`; the sum is rounded once, the product is not."""
        if len(x) <= self._few_rows.max_rows:
            self._few_rows(x, hidden, alpha)
        elif self._bias is None:
            hidden.addmm_(x, self.weight.t(), alpha=alpha)
        else:
            super().add_to(hidden, x, alpha)


class TritonGatedLinear:
    """activation(x gateᵀ) * (x upᵀ), in one launch for few rows; see `interface.Kernels.gated_linear`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: str, config: LinearConfig | None = None
    ) -> None:
        """`weight` [2 * width, in], gate first; `config`: instead of the one in `tuning.json`."""
        self._weight, self._bias, self._activation = weight, bias, activation
        self._few_rows = _FewRows(weight, bias, activation, config)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] → [T, width], a new tensor."""
        if len(x) <= self._few_rows.max_rows:
            return self._few_rows(x, x.new_empty(len(x), len(self._weight) // 2))
        return gated_activation(functional.linear(x, self._weight, self._bias), self._activation)
