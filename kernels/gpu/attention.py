"""Attention over a paged KV cache: one kernel for decode rows, chunks of prompts and mixtures of both.

A program computes one item of `attention_work.py` for one KV head: the tile's query rows are (token, head of the
group) pairs, keys and values are read through the block table where they lie, with an online softmax in float32
(FlashAttention-2, arXiv:2307.08691). An item of a row that was cut leaves its sum, its maximum and its weight for
`merge_kernel`, which is exact: the parts are scaled to their common maximum in float32 and rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import dot


@triton.jit
def _convert(stored, dtype: tl.constexpr):
    """Cached numbers as an operand; there is no instruction from int8 to bfloat16."""
    if stored.dtype == tl.int8:
        stored = stored.to(tl.float32)
    return stored.to(dtype)


@triton.jit
def _attend(
    query, sums, maximum, weight, start, stop, end, position,
    table_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, scale, softcap, window,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in keys `start` to `stop`, a multiple of KEYS apart; MASKED: not every query sees all of them.

    Scores are in base 2: without a soft cap `scale` holds log2(e). With one, tanh(a) = 1 - 2 / (exp(2a) + 1), `scale`
    holds 2 log2(e) / cap and `softcap` log2(e) cap.

    Returns:
        sums [M, DIMS], maximum [M] (base 2) and weight [M] with these keys.
    """
    dims = tl.arange(0, DIMS)
    for first in tl.range(start, stop, KEYS):
        keys = first + tl.arange(0, KEYS)
        if BLOCK_SIZE % KEYS == 0:  # all in one block
            block = tl.load(table_ptr + first // BLOCK_SIZE).to(tl.int64)
            slots = block * BLOCK_SIZE + (first % BLOCK_SIZE) + tl.arange(0, KEYS)
        else:
            # Behind the end there may be no table; the null block is always there.
            block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0) if MASKED else tl.load(
                table_ptr + keys // BLOCK_SIZE
            )  # fmt: skip
            slots = block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
        at = slots[:, None] * HEAD_DIM + dims[None, :]
        if DIMS == HEAD_DIM:
            k = tl.load(k_ptr + at)
        else:
            k = tl.load(k_ptr + at, mask=dims[None, :] < HEAD_DIM, other=0.0)
        scores = tl.zeros([query.shape[0], KEYS], dtype=tl.float32)
        scores = dot(query, tl.trans(_convert(k, query.dtype)), scores, PRECISION)
        if SCALED:
            scores *= tl.load(k_scales_ptr + slots)[None, :]
        scores *= scale
        if SOFTCAP:
            scores = (1.0 - 2.0 / (tl.exp2(scores) + 1.0)) * softcap
        if MASKED:
            visible = keys[None, :] <= position[:, None]
            if WINDOW:
                visible &= keys[None, :] > position[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet stays at minus infinity and must not subtract it from itself.
        reference = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        shrink = tl.exp2(maximum - reference)
        weights = tl.exp2(scores - reference[:, None])
        weight = weight * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        if DIMS == HEAD_DIM:
            v = tl.load(v_ptr + at)
        else:
            v = tl.load(v_ptr + at, mask=dims[None, :] < HEAD_DIM, other=0.0)
        if SCALED:
            weights *= tl.load(v_scales_ptr + slots)[None, :]
        sums = dot(weights.to(query.dtype), _convert(v, query.dtype), sums, PRECISION)
        maximum = higher
    return sums, maximum, weight


@triton.jit
def paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, out_ptr, partial_ptr, partial_max_ptr, partial_weight_ptr,
    items_ptr, tables_ptr, q_stride, table_stride, cache_stride, scale, softcap, window,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (KV head, item).

    q_ptr: [T, heads, HEAD_DIM], rows q_stride apart; out_ptr: the same, contiguous.
    k_ptr, v_ptr: [kv_heads, num_blocks, BLOCK_SIZE, HEAD_DIM], heads cache_stride apart; with SCALED, scales
        [kv_heads, num_blocks, BLOCK_SIZE] float32.
    partial_ptr: [partials, kv_heads, ROWS, DIMS] float32; maximum and weight the same without DIMS.
    """
    kv_head = tl.program_id(0)
    kv_heads = tl.num_programs(0)
    item_ptr = items_ptr + tl.program_id(1) * 8
    tokens = tl.load(item_ptr + 1)
    if tokens == 0:
        return
    first_token = tl.load(item_ptr).to(tl.int64)
    table_ptr = tables_ptr + tl.load(item_ptr + 2).to(tl.int64) * table_stride
    first_position = tl.load(item_ptr + 3)
    begin = tl.load(item_ptr + 4)
    end = tl.load(item_ptr + 5)
    partial = tl.load(item_ptr + 6)

    rows = tl.arange(0, ROWS)
    token = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, DIMS)
    valid = (token < tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    position = first_position + token
    q_at = (first_token + token)[:, None] * q_stride + head[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(q_ptr + q_at, mask=valid, other=0.0)

    k_ptr += kv_head.to(tl.int64) * cache_stride
    v_ptr += kv_head.to(tl.int64) * cache_stride
    k_scales_ptr += kv_head.to(tl.int64) * (cache_stride // HEAD_DIM)
    v_scales_ptr += kv_head.to(tl.int64) * (cache_stride // HEAD_DIM)
    sums = tl.zeros([ROWS, DIMS], dtype=tl.float32)
    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)

    # Keys that all queries of the tile see need no mask: after the window of the last, up to the first one's own.
    full_begin = begin
    if WINDOW:
        hidden = first_position + tokens - window - begin
        full_begin = tl.minimum(end, begin + tl.cdiv(tl.maximum(hidden, 0), KEYS) * KEYS)
        full_begin = tl.maximum(full_begin, begin)
    full_end = begin + tl.maximum(tl.minimum(end, first_position + 1) - begin, 0) // KEYS * KEYS
    full_end = tl.maximum(full_end, full_begin)
    if WINDOW:
        sums, maximum, weight = _attend(
            query, sums, maximum, weight, begin, full_begin, end, position,
            table_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, scale, softcap, window,
            BLOCK_SIZE, HEAD_DIM, DIMS, KEYS, SOFTCAP, WINDOW, SCALED, True, PRECISION,
        )  # fmt: skip
    sums, maximum, weight = _attend(
        query, sums, maximum, weight, full_begin, full_end, end, position,
        table_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, scale, softcap, window,
        BLOCK_SIZE, HEAD_DIM, DIMS, KEYS, SOFTCAP, WINDOW, SCALED, False, PRECISION,
    )  # fmt: skip
    sums, maximum, weight = _attend(
        query, sums, maximum, weight, full_end, end, end, position,
        table_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, scale, softcap, window,
        BLOCK_SIZE, HEAD_DIM, DIMS, KEYS, SOFTCAP, WINDOW, SCALED, True, PRECISION,
    )  # fmt: skip

    if partial < 0:
        out_at = ((first_token + token) * kv_heads * GROUP + head)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + out_at, (sums / weight[:, None]).to(out_ptr.dtype.element_ty), mask=valid)
    else:
        at = (partial * kv_heads + kv_head).to(tl.int64) * ROWS + rows
        tl.store(partial_ptr + at[:, None] * DIMS + dims[None, :], sums, mask=valid)
        tl.store(partial_max_ptr + at, maximum, mask=token < tokens)
        tl.store(partial_weight_ptr + at, weight, mask=token < tokens)


@triton.jit
def merge_kernel(
    out_ptr, partial_ptr, partial_max_ptr, partial_weight_ptr, merges_ptr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (query head, merge): the parts of one token and head, PARTS at a time."""
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    merge_ptr = merges_ptr + tl.program_id(1) * 4
    count = tl.load(merge_ptr + 2)
    if count == 0:
        return
    token = tl.load(merge_ptr).to(tl.int64)
    first = tl.load(merge_ptr + 1)
    row = tl.load(merge_ptr + 3) * GROUP + head % GROUP
    dims = tl.arange(0, DIMS)
    sums = tl.zeros([DIMS], dtype=tl.float32)
    maximum = float("-inf")
    weight = 0.0
    parts = tl.arange(0, PARTS)
    for start in range(0, count, PARTS):
        present = start + parts < count
        at = ((first + start + parts) * (heads // GROUP) + head // GROUP).to(tl.int64) * ROWS + row
        part_max = tl.load(partial_max_ptr + at, mask=present, other=float("-inf"))
        part_weight = tl.load(partial_weight_ptr + at, mask=present, other=0.0)
        part = tl.load(
            partial_ptr + at[:, None] * DIMS + dims[None, :],
            mask=present[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        higher = tl.maximum(maximum, tl.max(part_max, 0))
        reference = tl.where(higher == float("-inf"), 0.0, higher)  # a window may hide whole parts
        shrink, grow = tl.exp2(maximum - reference), tl.exp2(part_max - reference)
        sums = sums * shrink + tl.sum(part * grow[:, None], 0)
        weight = weight * shrink + tl.sum(part_weight * grow, 0)
        maximum = higher
    at = (token * heads + head) * HEAD_DIM + dims
    tl.store(out_ptr + at, (sums / weight).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
