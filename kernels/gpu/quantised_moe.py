"""The experts' gated MLPs with quantised weights; see `moe.py`. Weights are unpacked in registers, for any number of
tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantised_weight import QuantisedWeight
from .activation import ACTIVATIONS
from .expert_sort import SortedAssignments, sort_by_expert
from .moe import BLOCK_ROWS, block_rows, sum_experts
from .quantised_activations import round_activations
from .quantised_layout import LEAST_PART, PackedWeight, pack
from .quantised_tile import BLOCK_INPUTS, multiply_quantised_tile
from .tile_product import gate
from .tuning import TuningTable, dtype_name, load_tuning


@triton.jit(do_not_specialize=["assignments"])
def grouped_quantised_kernel(
    x_ptr, values_ptr, scales_ptr, zeros_ptr, scale_ptr, out_ptr, sorted_ptr, block_experts_ptr,
    assignments, outputs, inputs, row_bytes, groups, x_stride,
    ASSIGNMENTS_PER_ROW: tl.constexpr, SCALED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`moe.grouped_linear_kernel` with a packed weight per expert, TOGETHER being its GROUP; see
    `multiply_quantised_tile`."""
    pieces = tl.cdiv(outputs, BLOCK_N)
    blocks = tl.num_programs(0) // pieces
    first_block = tl.program_id(0) // (TOGETHER * pieces) * TOGETHER
    within = tl.program_id(0) % (TOGETHER * pieces)
    together = tl.minimum(blocks - first_block, TOGETHER)
    block = first_block + within % together
    expert = tl.load(block_experts_ptr + block).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(sorted_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = rows < assignments
    n = within // together * BLOCK_N + tl.arange(0, BLOCK_N)
    # Programs of the last piece read its last row again instead of testing every element.
    weight_rows = tl.minimum(n, outputs - 1).to(tl.int64)
    stride = 2 * outputs if GATED else outputs
    scales_at = expert * groups * stride
    y, up = multiply_quantised_tile(
        x_ptr + (rows // ASSIGNMENTS_PER_ROW).to(tl.int64)[:, None] * x_stride, valid,
        values_ptr + expert * stride * row_bytes, scales_ptr + scales_at, zeros_ptr + scales_at,
        weight_rows, weight_rows + outputs, row_bytes, groups, stride,
        0, tl.cdiv(inputs, BLOCK_INPUTS), inputs,
        GATED, EVEN, BITS, FLOAT, ZEROS, GROUP, PART, BLOCK_INPUTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dtype = out_ptr.dtype.element_ty
    if GATED:
        y = gate(y, up, dtype, ACTIVATION)
    if SCALED:
        y *= tl.load(scale_ptr + rows, mask=valid, other=0.0)[:, None]
    mask = valid[:, None] & (n < outputs)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * outputs + n[None, :], y.to(dtype), mask=mask)


@dataclasses.dataclass(frozen=True)
class GroupedQuantisedConfig:
    """How `grouped_quantised_kernel` runs."""

    block_n: int
    group: int
    """Blocks of assignments whose programs follow one another."""
    warps: int
    stages: int


def candidates(block_m: int, *, gated: bool) -> list[GroupedQuantisedConfig]:
    """Configurations worth timing, the most promising first."""
    group = 1 if block_m < 64 else 8
    return [
        GroupedQuantisedConfig(block_n // 2 if gated else block_n, group, 8 if block_m == 128 else 4, stages)
        for block_n in ((128, 64, 32) if block_m < 64 else (64, 128, 32))
        for stages in (4, 3)
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class PackedExperts:
    """One packed weight per expert, all alike."""

    weight: PackedWeight
    """[experts * out, bytes]; its scales and zeros are [experts * groups, out]."""
    outputs: int
    """Rows of one expert."""
    activations: torch.dtype | None
    group_size: int

    @property
    def groups(self) -> int:
        """Of one row."""
        return len(self.weight.scales) * self.outputs // self.weight.outputs


def can_group(weights: Sequence[QuantisedWeight]) -> bool:
    """Whether the experts of a projection are alike, and the kernel takes them."""
    first = weights[0]
    kinds = {
        (weight.shape, weight.values.dtype, weight.scales.dtype, weight.bits, weight.group_size, weight.activations)
        for weight in weights
    }
    group = first.group_size
    wide = group >= first.shape[1] or group % LEAST_PART == 0
    return len(kinds) == 1 and wide and all(weight.order is None for weight in weights)


def pack_experts(weights: Sequence[QuantisedWeight]) -> PackedExperts:
    """One after the other, so that no more than one expert is there twice; `can_group` has said that it works."""
    first = weights[0]
    packed = pack(first)
    has_zeros = any(weight.zeros is not None for weight in weights)
    count, (groups, outputs) = len(weights), packed.scales.shape
    values = packed.values.new_empty(count, *packed.values.shape)
    scales = packed.scales.new_empty(count, groups, outputs)
    zeros = values.new_full((count, groups, outputs), 1 << (first.bits - 1)) if has_zeros else None
    for index, weight in enumerate(weights):
        packed = pack(weight)
        values[index], scales[index] = packed.values, packed.scales
        if zeros is not None and packed.zeros is not None:
            zeros[index] = packed.zeros
    together = dataclasses.replace(
        packed,
        values=values.flatten(0, 1),
        scales=scales.flatten(0, 1),
        zeros=None if zeros is None else zeros.flatten(0, 1),
    )
    return PackedExperts(together, outputs, first.activations, first.group_size)


class TritonQuantisedExperts:
    """The weighted sum of each token's experts, rounded as in `moe.TritonExperts`."""

    def __init__(
        self,
        gate_up: Sequence[QuantisedWeight],
        down: Sequence[QuantisedWeight],
        activation: str,
        dtype: torch.dtype,
        tuning: TuningTable | None = None,
    ) -> None:
        """Weights per expert, of which `can_group` is true: `gate_up` [2 * width, hidden], gate first, and `down`
        [hidden, width]; `dtype`: of activations; `tuning`: None for the device's."""
        self._gate_up, self._down = pack_experts(gate_up), pack_experts(down)
        self._activation = ACTIVATIONS[activation]
        self._num_experts, self._hidden, self._width = len(down), *down[0].shape
        tuning = tuning or load_tuning(down[0].device)
        self._configs = {
            rows: tuple(
                tuning.find(
                    kernel,
                    GroupedQuantisedConfig,
                    {"dtype": dtype_name(dtype), "bits": experts.weight.bits, "block_m": rows},
                    {"outputs": outputs, "inputs": experts.weight.inputs},
                )
                for kernel, experts, outputs in (
                    ("experts_quantised_gate_up", self._gate_up, self._width),
                    ("experts_quantised_down", self._down, self._hidden),
                )
            )
            for rows, _ in BLOCK_ROWS
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self._gate_up.weight.nbytes + self._down.weight.nbytes

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden], a new tensor.

        Args:
            weights, ids: [T, experts per token] from `route`, contiguous; the ids are of existing experts.
        """
        experts_per_token = ids.shape[1]
        assert weights.is_contiguous()
        order = sort_by_expert(ids, self._num_experts, block_rows(ids.numel(), self._num_experts))
        gate_up_config, down_config = self._configs[order.block_m]
        gated = x.new_empty(ids.numel(), self._width)
        grouped_quantised(
            x, self._gate_up, gated, order, gate_up_config,
            assignments_per_row=experts_per_token, activation=self._activation,
        )  # fmt: skip
        results = x.new_empty(ids.numel(), self._hidden)
        grouped_quantised(gated, self._down, results, order, down_config, scale=weights)
        return sum_experts(results, experts_per_token)


def grouped_quantised(
    x: Tensor,
    experts: PackedExperts,
    out: Tensor,
    order: SortedAssignments,
    config: GroupedQuantisedConfig,
    *,
    assignments_per_row: int = 1,
    activation: int | None = None,
    scale: Tensor | None = None,
) -> None:
    """`moe.grouped_linear` with packed weights."""
    weight = experts.weight
    if experts.activations is not None:
        x, _ = round_activations(x, experts.activations, experts.group_size, expanded=True)
    assert x.stride(1) == 1
    assignments, outputs = out.shape
    grouped_quantised_kernel[(order.max_blocks * triton.cdiv(outputs, config.block_n),)](
        x, weight.values, weight.scales, weight.scales if weight.zeros is None else weight.zeros,
        weight.scales if scale is None else scale, out, order.assignments, order.block_experts,
        assignments, outputs, weight.inputs, weight.values.shape[1], experts.groups, x.stride(0),
        ASSIGNMENTS_PER_ROW=assignments_per_row, SCALED=scale is not None,
        GATED=activation is not None, ACTIVATION=activation or 0, EVEN=weight.inputs % BLOCK_INPUTS == 0,
        BITS=weight.bits, FLOAT=weight.is_float, ZEROS=weight.zeros is not None, GROUP=weight.group, PART=weight.part,
        TOGETHER=config.group, BLOCK_INPUTS=BLOCK_INPUTS, BLOCK_M=order.block_m, BLOCK_N=config.block_n,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
