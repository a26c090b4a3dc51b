"""The largest logit of every row. A row is cut into splits of its own, so that one row alone uses many processors:

    row    | split 0 | split 1 | … |    every program: (largest, its id) as one integer
               └────────┴──── … ┴─▶     one program per row: the largest of them

An integer that orders like a float makes argmax a plain maximum, exact in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
_LAST_ID = tl.constexpr(2**31 - 1)

_MAX_SPLIT = 4096
"""Logits per program: 16 KiB, which 256 threads load in four wide reads each. A constant, so that how a row is cut,
and with it the rounding of what is summed up, depends on the vocabulary only."""


def split_size(vocab_size: int) -> int:
    """Logits of a split, a power of two."""
    return min(_MAX_SPLIT, triton.next_power_of_2(vocab_size))


def warps(block: int) -> int:
    """So that a thread has 16 elements."""
    return min(8, max(1, block // 512))


@triton.jit
def finite(x):
    """As `nan_to_num` in the reference: NaN is the smallest number, an infinity the largest (smallest)."""
    clamped = tl.minimum(tl.maximum(x, -FLOAT_MAX), FLOAT_MAX)
    return tl.where(x != x, -FLOAT_MAX, clamped)


@triton.jit
def order_key(x):
    """int32 that orders like the float32 `x`, with NaN above all and both zeros equal."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(x == 0.0, 0, key)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def key_to_float(key):
    """The float32 of an `order_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(x, ids):
    """int64 that orders by `x` and then by lower id."""
    return (order_key(x).to(tl.int64) << 32) | (ids ^ _LAST_ID).to(tl.int64)


@triton.jit
def best_of_row(best_ptr, row, splits, BLOCK_S: tl.constexpr):
    """The packed largest of a row, from those of its splits."""
    indices = tl.arange(0, BLOCK_S)
    packed = tl.load(best_ptr + row * splits + indices, mask=indices < splits, other=-(2**63))
    return tl.max(packed, 0)


@triton.jit
def packed_value(packed):
    """float32."""
    return key_to_float((packed >> 32).to(tl.int32))


@triton.jit
def packed_id(packed):
    """int64."""
    return (packed & 0xFFFFFFFF) ^ _LAST_ID


@triton.jit
def split_argmax_kernel(
    logits_ptr, temperature_ptr, best_ptr, stride, vocab, HAS_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (split, row): the split's largest logit and its id. Where the row's temperature is not zero, it will be
    drawn at random: the largest finite number is wanted."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=-float("inf"))
    if HAS_TEMPERATURE:
        drawn = tl.load(temperature_ptr + row) > 0.0
        x = tl.where(drawn, finite(x), x)
    # Behind the vocabulary everything is as small as can be, with higher ids.
    tl.store(best_ptr + row * tl.num_programs(0) + split, tl.max(pack(x, ids), 0))


@triton.jit
def merge_argmax_kernel(best_ptr, tokens_ptr, splits, BLOCK_S: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(tokens_ptr + row, packed_id(best_of_row(best_ptr, row, splits, BLOCK_S)))


def split_argmax(logits: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Packed (largest, id) of every split: [S, splits] int64, for `merge_argmax`.

    Args:
        logits: [S, vocab] float32; rows may be parts of longer ones.
        temperature: [S] float32; rows where it is not zero are made finite.
    """
    rows, vocab_size = logits.shape
    block = split_size(vocab_size)
    best = torch.empty(rows, triton.cdiv(vocab_size, block), dtype=torch.int64, device=logits.device)
    split_argmax_kernel[(best.shape[1], rows)](
        logits, best if temperature is None else temperature, best, logits.stride(0), vocab_size,
        HAS_TEMPERATURE=temperature is not None, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return best


def merge_argmax(best: Tensor) -> Tensor:
    """[S, splits] from `split_argmax` → [S] int64 ids."""
    rows, splits = best.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=best.device)
    merge_argmax_kernel[(rows,)](best, tokens, splits, BLOCK_S=triton.next_power_of_2(splits), num_warps=1)
    return tokens


def argmax(logits: Tensor) -> Tensor:
    """[S, vocab] float32 → [S] int64: the index of the largest, of equals the first, the first NaN before all."""
    return merge_argmax(split_argmax(logits))
