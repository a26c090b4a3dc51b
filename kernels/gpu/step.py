"""What turns a plan into the inputs of a step where the device, not the host, knows the newest tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256
NO_SLOT = -1
"""Of a row that pads a recorded step: it reads token 0 and writes to the null block."""


@triton.jit
def update_kernel(table_ptr, values_ptr, segments_ptr, table_stride, BLOCK: tl.constexpr):
    """Program (segment, piece): copy values into a row of a table. A segment is (row, column, first value, length)."""
    segment_ptr = segments_ptr + tl.program_id(0) * 4
    row = tl.load(segment_ptr).to(tl.int64)
    column = tl.load(segment_ptr + 1)
    first = tl.load(segment_ptr + 2)
    length = tl.load(segment_ptr + 3)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < length
    values = tl.load(values_ptr + first + index, mask=mask)
    tl.store(table_ptr + row * table_stride + column + index, values, mask=mask)


@triton.jit
def prepare_kernel(
    rows_ptr, tokens_ptr, tables_ptr, token_out_ptr, position_out_ptr, slot_out_ptr, tokens_stride, tables_stride,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, piece of its tokens): their ids, positions and cache slots.

    A row is (slot, first position, tokens, index of the first token, block of the last token or -1, 0, 0, 0); the block
    is entered in the table, which may not have it yet.
    """
    row_ptr = rows_ptr + tl.program_id(0) * 8
    slot = tl.load(row_ptr).to(tl.int64)
    start = tl.load(row_ptr + 1)
    count = tl.load(row_ptr + 2)
    first = tl.load(row_ptr + 3)
    last_block = tl.load(row_ptr + 4)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    known = mask & (slot >= 0)
    position = start + index
    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=known, other=0)
    block = tl.load(tables_ptr + slot * tables_stride + position // BLOCK_SIZE, mask=known, other=0)
    last = start + count - 1
    is_new = known & (last_block >= 0) & (position // BLOCK_SIZE == last // BLOCK_SIZE)
    block = tl.where(is_new, last_block, block)
    tl.store(tables_ptr + slot * tables_stride + position // BLOCK_SIZE, block, mask=is_new & (position == last))
    tl.store(token_out_ptr + first + index, token.to(tl.int64), mask=mask)
    tl.store(position_out_ptr + first + index, tl.where(known, position, 0).to(tl.int64), mask=mask)
    cache_slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slot_out_ptr + first + index, tl.where(known, cache_slot, 0), mask=mask)


@triton.jit(do_not_specialize=["count"])
def record_kernel(tokens_ptr, places_ptr, sampled_ptr, count, tokens_stride, BLOCK: tl.constexpr):
    """Write sampled tokens [count] int64 behind their sequences; a place is the row of `prepare_kernel` that the token
    was sampled from."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    slot = tl.load(places_ptr + 8 * index, mask=mask, other=0).to(tl.int64)
    position = tl.load(places_ptr + 8 * index + 1, mask=mask, other=0)
    position += tl.load(places_ptr + 8 * index + 2, mask=mask, other=0)
    token = tl.load(sampled_ptr + index, mask=mask, other=0)
    tl.store(tokens_ptr + slot * tokens_stride + position, token.to(tl.int32), mask=mask)


def update(table: Tensor, values: Tensor, segments: Tensor, longest: int) -> None:
    """Write pieces of rows.

    Args:
        table: [rows, columns] int32.
        values: [n] int32, all pieces one after the other.
        segments: [S, 4] int32: row, column, first value, length.
        longest: of the segments.
    """
    update_kernel[(len(segments), triton.cdiv(longest, _BLOCK))](
        table, values, segments, table.stride(0), BLOCK=_BLOCK, num_warps=4
    )


def prepare(
    rows: Tensor, tokens: Tensor, tables: Tensor, longest: int, block_size: int, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Ids, positions and cache slots of a step's tokens, each [T] int64, into `out`.

    Args:
        rows: [R, 8] int32, as `prepare_kernel` says.
        tokens: [slots, max_model_len + 1] int32, known tokens.
        tables: [slots, blocks] int32; new blocks of decode rows are entered.
        longest: tokens of the longest row.
    """
    token_ids, positions, slots = out
    block = 1 if longest == 1 else _BLOCK  # and no size between: each would be compiled when it first comes
    prepare_kernel[(len(rows), triton.cdiv(longest, block))](
        rows, tokens, tables, token_ids, positions, slots, tokens.stride(0), tables.stride(0),
        BLOCK_SIZE=block_size, BLOCK=block, num_warps=1,
    )  # fmt: skip


def record(tokens: Tensor, rows: Tensor, sampled: Tensor) -> None:
    """Write sampled tokens [S] int64 to `tokens`, behind the `rows` [at least S, 8] int32 that they belong to."""
    count = len(sampled)
    record_kernel[(triton.cdiv(count, _BLOCK),)](
        tokens, rows, sampled, count, tokens.stride(0), BLOCK=_BLOCK, num_warps=1
    )
