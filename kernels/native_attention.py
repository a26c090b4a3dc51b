"""The C implementation of decode attention on CPUs, `kernels/native/decode_attention.c`.

It is compiled when the package is installed, if there is a C compiler; without it the torch path serves. Threads come
from the OpenMP runtime that torch has loaded already, so that there is one pool of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib import machinery
from pathlib import Path

import torch
from torch import Tensor

from .attention_metadata import AttentionMetadata

_DTYPES = (torch.float32, torch.bfloat16)


class _Arguments(ctypes.Structure):
    """`struct decode_attention`."""

    _fields_ = [
        ("query", ctypes.c_void_p),
        ("k_cache", ctypes.c_void_p),
        ("v_cache", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("bfloat16", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


@cache
def _library() -> Callable[..., int] | None:
    """The compiled function, or None if it was not built."""
    for suffix in machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            function = ctypes.CDLL(str(path)).troupe_decode_attention
            function.argtypes, function.restype = [ctypes.POINTER(_Arguments)], ctypes.c_int
            return function
    return None


def can_decode(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `decode_attention` was built and knows `dtype`."""
    return device.type == "cpu" and dtype in _DTYPES and _library() is not None


def decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Attention of the step's first `metadata.decode_rows` rows.

    Args:
        query: [T, heads, head_dim] float32 or bfloat16; a row's heads must lie together.
        k_cache, v_cache: [kv_heads, num_blocks, block_size, head_dim] of the same dtype, contiguous.
        out: [T, heads, head_dim], contiguous; its first rows are written.

    Raises:
        MemoryError: there is none for one row's scores.
    """
    function = _library()
    assert function is not None, "ask can_decode first"
    _, heads, head_dim = query.shape
    kv_heads, num_blocks, block_size, _ = k_cache.shape
    assert query.stride()[1:] == (head_dim, 1)
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    assert out.is_contiguous()
    assert metadata.block_tables.is_contiguous()
    assert query.dtype == k_cache.dtype == v_cache.dtype == out.dtype
    assert metadata.block_tables.dtype == metadata.context_lens.dtype == torch.int32
    arguments = _Arguments(
        query.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        metadata.block_tables.data_ptr(),
        metadata.context_lens.data_ptr(),
        query.stride(0),
        num_blocks,
        metadata.block_tables.stride(0),
        metadata.decode_rows,
        heads,
        kv_heads,
        head_dim,
        block_size,
        window or 0,
        query.dtype == torch.bfloat16,
        scale,
        softcap or 0.0,
    )
    if function(ctypes.byref(arguments)):
        raise MemoryError(f"no memory for the scores of a row of {max(metadata.contexts)} tokens")
