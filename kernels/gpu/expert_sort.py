"""Sorting a step's assignments of tokens to experts, for grouped products.

An assignment is one (token, one of its experts); its number is token * experts per token + slot. Sorted by expert and
cut into blocks of a product's rows, no block has two experts:

    ids of the assignments 0…6     2 0 2 2 0 2 2      blocks of 4 rows
    sorted                         1 4 · · | 0 2 3 5 | 6 · · ·     · = 7, which is no assignment
    experts of the blocks             0         2         2     -1

How many blocks there are is known to the device alone. The host launches for the most there can be, and programs of
blocks without an expert end at once; so nothing waits, and launches depend on shapes only, as a CUDA graph needs it.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

_SMALL_BLOCK = 256
_BLOCK = 4096
"""The most assignments that a program looks at together."""
_COUNT_INSIDE = 1024
"""With so many assignments at most, every program of the sort counts those of all experts itself."""


@triton.jit(do_not_specialize=["assignments"])
def count_experts_kernel(ids_ptr, counts_ptr, assignments, BLOCK: tl.constexpr):
    """Assignments to each expert; one program per expert."""
    expert = tl.program_id(0)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, assignments, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + positions, mask=positions < assignments, other=-1)
        counts += (ids == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(counts, 0))


@triton.jit(do_not_specialize=["assignments", "max_blocks"])
def sort_by_expert_kernel(
    ids_ptr, counts_ptr, sorted_ptr, block_experts_ptr, assignments, num_experts, max_blocks,
    HAS_COUNTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per expert writes its blocks, and that of the last expert also those that have none."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    if HAS_COUNTS:
        counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0)
    else:
        counts = tl.zeros((BLOCK_E,), tl.int32)
        for start in range(0, assignments, 32):
            positions = start + tl.arange(0, 32)
            ids = tl.load(ids_ptr + positions, mask=positions < assignments, other=-1)
            counts += tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), 0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where(experts < expert, blocks, 0), 0)
    count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    end_block = first_block + (count + BLOCK_M - 1) // BLOCK_M

    for start in range(first_block, end_block, BLOCK):
        indices = start + tl.arange(0, BLOCK)
        tl.store(block_experts_ptr + indices, tl.zeros((BLOCK,), tl.int32) + expert, mask=indices < end_block)
    if expert == num_experts - 1:
        for start in range(end_block, max_blocks, BLOCK):
            indices = start + tl.arange(0, BLOCK)
            tl.store(block_experts_ptr + indices, tl.full((BLOCK,), -1, tl.int32), mask=indices < max_blocks)

    place = first_block * BLOCK_M
    for start in range(0, assignments, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + positions, mask=positions < assignments, other=-1)
        mine = (ids == expert).to(tl.int32)
        tl.store(sorted_ptr + place + tl.cumsum(mine, 0) - 1, positions, mask=mine == 1)
        place += tl.sum(mine, 0)
    padding = place + tl.arange(0, BLOCK_M)
    tl.store(sorted_ptr + padding, tl.zeros((BLOCK_M,), tl.int32) + assignments, mask=padding < end_block * BLOCK_M)


@dataclasses.dataclass(frozen=True, slots=True)
class SortedAssignments:
    """A step's assignments by expert, in blocks of `block_m`; within an expert in ascending order."""

    assignments: Tensor
    """[max blocks * block_m] int32; the number of all assignments where a block is not full. What belongs to blocks
    without an expert is undefined."""
    block_experts: Tensor
    """[max blocks] int32: -1 for blocks beyond the last."""
    block_m: int

    @property
    def max_blocks(self) -> int:
        return len(self.block_experts)


def max_blocks(assignments: int, num_experts: int, block_m: int) -> int:
    """The most blocks that so many assignments can take: every expert that has some fills up one block."""
    return (assignments + min(assignments, num_experts) * (block_m - 1)) // block_m


def sort_by_expert(ids: Tensor, num_experts: int, block_m: int) -> SortedAssignments:
    """Sort the assignments of `ids` [T, experts per token], integers from 0 to num_experts - 1.

    Args:
        block_m: rows of a block, a power of two.
    """
    assert ids.is_contiguous()
    assignments = ids.numel()
    blocks = max_blocks(assignments, num_experts, block_m)
    order = torch.empty(blocks * block_m, dtype=torch.int32, device=ids.device)
    block_experts = torch.empty(blocks, dtype=torch.int32, device=ids.device)
    has_counts = assignments > _COUNT_INSIDE
    counts = ids
    if has_counts:
        counts = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
        count_experts_kernel[(num_experts,)](ids, counts, assignments, BLOCK=_BLOCK, num_warps=8)
    block = _SMALL_BLOCK if assignments <= _SMALL_BLOCK else _BLOCK  # each is compiled
    sort_by_expert_kernel[(num_experts,)](
        ids, counts, order, block_experts, assignments, num_experts, blocks,
        HAS_COUNTS=has_counts, BLOCK_M=block_m, BLOCK_E=triton.next_power_of_2(num_experts), BLOCK=block,
        num_warps=4 if block <= 1024 else 8,
    )  # fmt: skip
    return SortedAssignments(order, block_experts, block_m)
