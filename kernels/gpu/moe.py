"""The experts' gated MLPs as two grouped products; see `kernels/moe.py`.

    x ─ gather by expert ─ gate and up, activation ─▶ [assignments, width] ─ down, times weight ─▶ [assignments, hidden]
      ─ sum of a token's experts ─▶ [T, hidden]

A program multiplies one block of sorted assignments (`expert_sort.py`) with a piece of its expert's weight. With few
tokens a block has 16 rows, and each active expert's weights are read once; with many, blocks are as large as tensor
cores like them.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import ACTIVATIONS
from .expert_sort import SortedAssignments, sort_by_expert
from .tile_product import gate, multiply_tile
from .tuning import TuningTable, dtype_name, load_tuning

BLOCK_ROWS = ((16, 16), (32, 32), (64, 256), (128, None))
"""Rows of a block, and up to how many assignments per expert on average they are used."""
_SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["assignments"])
def grouped_linear_kernel(
    x_ptr, weight_ptr, scale_ptr, out_ptr, sorted_ptr, block_experts_ptr,
    assignments, outputs, inputs, x_stride,
    ASSIGNMENTS_PER_ROW: tl.constexpr, SCALED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[a] = x[a // ASSIGNMENTS_PER_ROW] weight[expert of a]ᵀ for every assignment a.

    Program (block of assignments, piece of the outputs); those of GROUP blocks with all pieces follow one another, the
    blocks innermost, so that blocks of one expert find the weight in the cache.

    GATED: an expert's weight has 2 * outputs rows, gate first. SCALED: rows are multiplied with scale[a] (float32).
    """
    pieces = tl.cdiv(outputs, BLOCK_N)
    blocks = tl.num_programs(0) // pieces
    group = tl.program_id(0) // (GROUP * pieces)
    within = tl.program_id(0) % (GROUP * pieces)
    group_size = tl.minimum(blocks - group * GROUP, GROUP)
    block = group * GROUP + within % group_size
    piece = within // group_size
    expert = tl.load(block_experts_ptr + block).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(sorted_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = rows < assignments
    n = piece * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Programs of the last piece read its last row again instead of testing every element.
    weight_rows = tl.minimum(n, outputs - 1).to(tl.int64)
    weight_ptr += expert * inputs * (2 * outputs if GATED else outputs)
    x_ptrs = x_ptr + (rows // ASSIGNMENTS_PER_ROW).to(tl.int64)[:, None] * x_stride + k[None, :]
    weight_ptrs = weight_ptr + weight_rows[None, :] * inputs + k[:, None]
    up_ptrs = weight_ptr + (weight_rows + outputs)[None, :] * inputs + k[:, None]
    y, up = multiply_tile(
        x_ptrs, valid, weight_ptrs, up_ptrs, k, 0, inputs, inputs, GATED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K
    )
    dtype = out_ptr.dtype.element_ty
    if GATED:
        y = gate(y, up, dtype, ACTIVATION)
    if SCALED:
        y *= tl.load(scale_ptr + rows, mask=valid, other=0.0)[:, None]
    mask = valid[:, None] & (n < outputs)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * outputs + n[None, :], y.to(dtype), mask=mask)


@triton.jit
def sum_experts_kernel(x_ptr, out_ptr, width, EXPERTS_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of a token's rows, in their order, in float32. Program (token, piece of the width)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(EXPERTS_PER_TOKEN):
        row = token * EXPERTS_PER_TOKEN + slot
        total += tl.load(x_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


@dataclasses.dataclass(frozen=True)
class GroupedConfig:
    """How `grouped_linear_kernel` runs."""

    block_n: int
    block_k: int
    group: int
    """Blocks of assignments whose programs follow one another."""
    warps: int
    stages: int


def candidates(block_m: int, dtype: torch.dtype, *, gated: bool) -> list[GroupedConfig]:
    """Configurations worth timing, the most promising first."""
    few, many = ((64, 128), (128, 64), (32, 128), (64, 64)), ((128, 64), (256, 64), (64, 64), (128, 32))
    found = []
    for block_n, block_k in few if block_m < 64 else many:
        # Two weights at a time where one is gated; float32 takes twice the memory, and many registers.
        block_n = block_n // 2 if gated else block_n
        block_k = block_k if dtype.itemsize == 2 else block_k // 4
        accumulators = block_m * block_n * (2 if gated else 1)
        warps = 8 if accumulators > 2**13 else 4
        if accumulators > 2**15:
            continue
        found += [
            GroupedConfig(block_n, block_k, group, warps, stages)
            for stages in (4, 3)
            for group in ((1,) if block_m < 64 else (8,))
        ]
    return found


def block_rows(assignments: int, num_experts: int) -> int:
    """Rows of a block, from the assignments per expert on average."""
    average = assignments / num_experts
    return next(rows for rows, most in BLOCK_ROWS if most is None or average <= most)


class TritonExperts:
    """The weighted sum of each token's experts, as `kernels/moe.py` has it; see `interface.Kernels.experts`.

    An expert's result times its weight is rounded once, and the sum, in the order of a token's experts, once more; the
    reference rounds the weight, both factors' product and every partial sum.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, activation: str, tuning: TuningTable | None = None) -> None:
        """`gate_up` [experts, 2 * width, hidden], gate first; `down` [experts, hidden, width]; `tuning`: None for the
        device's."""
        assert gate_up.is_contiguous()
        assert down.is_contiguous()
        self._gate_up, self._down = gate_up, down
        self._activation = ACTIVATIONS[activation]
        self._num_experts, self._hidden, self._width = down.shape
        tuning = tuning or load_tuning(down.device)
        dtype = dtype_name(down.dtype)
        self._configs = {
            rows: tuple(
                tuning.find(
                    kernel, GroupedConfig, {"dtype": dtype, "block_m": rows}, {"outputs": outputs, "inputs": inputs}
                )
                for kernel, outputs, inputs in (
                    ("experts_gate_up", self._width, self._hidden),
                    ("experts_down", self._hidden, self._width),
                )
            )
            for rows, _ in BLOCK_ROWS
        }

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden], a new tensor.

        Args:
            weights, ids: [T, experts per token] from `route`, contiguous; the ids are of existing experts.
        """
        experts_per_token = ids.shape[1]
        assert x.stride(1) == 1
        assert weights.is_contiguous()
        order = sort_by_expert(ids, self._num_experts, block_rows(ids.numel(), self._num_experts))
        gate_up_config, down_config = self._configs[order.block_m]
        gated = x.new_empty(ids.numel(), self._width)
        grouped_linear(
            x, self._gate_up, gated, order, gate_up_config,
            assignments_per_row=experts_per_token, activation=self._activation,
        )  # fmt: skip
        results = x.new_empty(ids.numel(), self._hidden)
        grouped_linear(gated, self._down, results, order, down_config, scale=weights)
        return sum_experts(results, experts_per_token)


def sum_experts(results: Tensor, experts_per_token: int) -> Tensor:
    """[T * experts per token, hidden] → [T, hidden], a new tensor: the sums of the tokens' rows."""
    tokens, hidden = len(results) // experts_per_token, results.shape[1]
    out = results.new_empty(tokens, hidden)
    sum_experts_kernel[(tokens, triton.cdiv(hidden, _SUM_BLOCK))](
        results, out, hidden, EXPERTS_PER_TOKEN=experts_per_token, BLOCK=_SUM_BLOCK
    )
    return out


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    order: SortedAssignments,
    config: GroupedConfig,
    *,
    assignments_per_row: int = 1,
    activation: int | None = None,
    scale: Tensor | None = None,
) -> None:
    """One product per assignment, with the weight of its expert.

    Args:
        x: [assignments / assignments_per_row, in].
        weight: [experts, out, in], or [experts, 2 * out, in] with an activation, gate first.
        out: [assignments, out], written.
        activation: a value of `ACTIVATIONS`: out becomes activation(gate) * up.
        scale: float32, as many as there are assignments: what their rows are multiplied with.
    """
    assignments, outputs = out.shape
    inputs = weight.shape[2]
    pieces = triton.cdiv(outputs, config.block_n)
    grouped_linear_kernel[(order.max_blocks * pieces,)](
        x, weight, x if scale is None else scale, out, order.assignments, order.block_experts,
        assignments, outputs, inputs, x.stride(0),
        ASSIGNMENTS_PER_ROW=assignments_per_row, SCALED=scale is not None,
        GATED=activation is not None, ACTIVATION=activation or 0, EVEN=inputs % config.block_k == 0,
        GROUP=config.group, BLOCK_M=order.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
