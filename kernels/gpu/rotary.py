"""Rotary embedding: a step's cosines and sines, and what happens to queries, keys and values before attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS = 16
"""(token, head) pairs of a program: enough loads under way, and for a single token more programs than one."""


@triton.jit
def rotation_kernel(
    positions_ptr, frequencies_ptr, cos_ptr, sin_ptr, frequency_stride, width, factor, BLOCK: tl.constexpr
):  # fmt: skip
    """Cosines and sines of one position per program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    position = tl.load(positions_ptr + row).to(tl.float32)
    angles = position * tl.load(frequencies_ptr + row * frequency_stride + columns, mask=mask, other=0.0)
    tl.store(cos_ptr + row * width + columns, tl.cos(angles) * factor, mask=mask)
    tl.store(sin_ptr + row * width + columns, tl.sin(angles) * factor, mask=mask)


@triton.jit(do_not_specialize=["pairs"])  # a number that changes from step to step must not compile anything
def rotate_and_store_kernel(
    qkv_ptr, query_ptr, cos_ptr, sin_ptr, query_norm_ptr, key_norm_ptr, slots_ptr,
    k_ptr, v_ptr, k_scales_ptr, v_scales_ptr,
    pairs, num_heads, num_kv_heads, cache_stride, eps,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, SCALED: tl.constexpr, INTEGER: tl.constexpr, LARGEST: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """PAIRS (token, head) pairs per program; heads are those of queries, then keys, then values.

    Dimension d turns with its partner, d + HALF or d - HALF; those behind 2 * HALF stay.
    """
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    valid = pair < pairs
    all_heads = num_heads + 2 * num_kv_heads
    token = (pair // all_heads).to(tl.int64)
    head = pair % all_heads
    is_query = head < num_heads
    is_value = head >= num_heads + num_kv_heads
    dims = tl.arange(0, DIMS)
    partners = tl.where(dims < HALF, dims + HALF, tl.where(dims < 2 * HALF, dims - HALF, dims))
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    qkv_ptr += pair.to(tl.int64)[:, None] * HEAD_DIM
    element = query_ptr.dtype.element_ty
    x = tl.load(qkv_ptr + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(qkv_ptr + partners[None, :], mask=mask & ~is_value[:, None], other=0.0).to(tl.float32)
    if NORM:
        rms = tl.where(is_value, 1.0, tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps))[:, None]
        in_head = dims < HEAD_DIM
        # The reference rounds the norm before it rotates.
        x = (x * rms * _norm_weight(query_norm_ptr, key_norm_ptr, dims, in_head, is_query, is_value)).to(element)
        partner *= rms * _norm_weight(query_norm_ptr, key_norm_ptr, partners, in_head, is_query, is_value)
        x, partner = x.to(tl.float32), partner.to(element).to(tl.float32)
    turns = valid[:, None] & ~is_value[:, None] & (dims < 2 * HALF)[None, :]
    angle_at = token[:, None] * HALF + (dims % HALF)[None, :]
    cos = tl.load(cos_ptr + angle_at, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + angle_at, mask=turns, other=0.0)
    turned = (x * cos + tl.where(dims < HALF, -partner, partner) * sin).to(element)
    query_at = (token * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(query_ptr + query_at, turned, mask=mask & is_query[:, None])

    # What is not a number becomes zero, infinities the largest number, as `torch.nan_to_num` has it.
    finite = turned.to(tl.float32)
    finite = tl.where(finite == finite, tl.minimum(tl.maximum(finite, -LARGEST), LARGEST), 0.0)
    is_key = valid & ~is_query & ~is_value
    is_value = valid & is_value
    slot = tl.load(slots_ptr + token, mask=is_key | is_value, other=0)
    kv_head = tl.where(is_value, head - num_heads - num_kv_heads, head - num_heads).to(tl.int64)
    row = kv_head * (cache_stride // HEAD_DIM) + slot
    stored = k_ptr.dtype.element_ty
    if SCALED:
        limit = 127.0 if INTEGER else 448.0
        scale = tl.max(tl.abs(finite), 1) / limit
        scale = tl.where(scale > 0.0, scale, 1.0)
        tl.store(k_scales_ptr + row, scale, mask=is_key)
        tl.store(v_scales_ptr + row, scale, mask=is_value)
        finite = finite / scale[:, None]
        if INTEGER:
            finite = tl.floor(finite + 0.5)
        finite = tl.minimum(tl.maximum(finite, -limit), limit)
    cache_at = row[:, None] * HEAD_DIM + dims[None, :]
    tl.store(k_ptr + cache_at, finite.to(stored), mask=mask & is_key[:, None])
    tl.store(v_ptr + cache_at, finite.to(stored), mask=mask & is_value[:, None])


@triton.jit
def _norm_weight(query_norm_ptr, key_norm_ptr, dims, in_head, is_query, is_value):
    """[pairs, dims]: the weight of the query norm or of the key norm; 1 for values."""
    of_query = tl.load(query_norm_ptr + dims, mask=in_head, other=0.0)[None, :]
    of_key = tl.load(key_norm_ptr + dims, mask=in_head, other=0.0)[None, :]
    return tl.where(is_query[:, None], of_query, tl.where(is_value[:, None], 1.0, of_key))


def rotate_and_store(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    scales: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """See `interface.Kernels.rotate_and_store`: [T, heads, head_dim], a new tensor; `qkv` stays as it is.

    Args:
        slot_mapping: [T] int64: block id * block size + offset.
    """
    tokens, all_heads, head_dim = qkv.shape
    kv_heads = len(k_cache)
    heads = all_heads - 2 * kv_heads
    cos, sin = rotation
    query = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    query_norm, key_norm = norms or (cos, cos)
    k_scales, v_scales = scales or (cos, cos)
    pairs = tokens * all_heads
    rotate_and_store_kernel[(triton.cdiv(pairs, _PAIRS),)](
        qkv, query, cos, sin, query_norm, key_norm, slot_mapping, k_cache, v_cache, k_scales, v_scales,
        pairs, heads, kv_heads, k_cache.stride(0), eps,
        HEAD_DIM=head_dim, DIMS=triton.next_power_of_2(head_dim), HALF=cos.shape[1],
        NORM=norms is not None, SCALED=scales is not None, INTEGER=k_cache.dtype == torch.int8,
        LARGEST=torch.finfo(qkv.dtype).max, PAIRS=_PAIRS, num_warps=4,
    )  # fmt: skip
    return query


def rotation(
    positions: Tensor, frequencies: Tensor, factor: float, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See `interface.Kernels.rotation`."""
    shape = (len(positions), frequencies.shape[-1])
    if out is None:
        out = (torch.empty(shape, device=positions.device), torch.empty(shape, device=positions.device))
    cos, sin = out
    width = shape[1]
    rotation_kernel[(len(positions),)](
        positions, frequencies, cos, sin, frequencies.stride(0) if frequencies.dim() > 1 else 0, width, factor,
        BLOCK=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
    return cos, sin
