"""Host memory in huge pages.

Weights are streamed and KV blocks are read in places all over the cache: with pages of 4 KiB nearly every block costs a
walk through the page table, and no hardware prefetcher crosses a page.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 * 1024 * 1024
ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, in huge pages where the system grants them; memory is taken when it is first written."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    # Private: Python's default is shared memory, which has settings of its own and usually no huge pages.
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE
    return whole[begin : begin + num_bytes].view(dtype).view(shape)


class Arena:
    """Hands out zeros from large pieces of memory, so that not every weight ends with a page that is mostly empty.

    A piece is freed when nothing that was taken from it is left.
    """

    def __init__(self, piece_bytes: int = 32 * HUGE_PAGE) -> None:
        self._piece_bytes = piece_bytes
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._taken = 0

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """[count] zeros, aligned to a cache line."""
        num_bytes = count * dtype.itemsize
        begin = -(-self._taken // ALIGNMENT) * ALIGNMENT
        if begin + num_bytes > len(self._piece):
            whole_pages = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
            self._piece, begin = zeros((max(whole_pages, self._piece_bytes),), torch.uint8), 0
        self._taken = begin + num_bytes
        return self._piece[begin : self._taken].view(dtype)
