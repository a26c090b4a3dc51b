"""Host memory in huge pages.

Weights are streamed and KV blocks are read in places all over the cache: with pages of 4 KiB nearly every block costs a
walk through the page table, and no hardware prefetcher crosses a page.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 * 1024 * 1024


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, in huge pages where the system grants them; memory is taken when it is first written."""
    count = 1
    for size in shape:
        count *= size
    num_bytes = count * dtype.itemsize
    if num_bytes < HUGE_PAGE:
        return torch.zeros(shape, dtype=dtype)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    # Private: Python's default is shared memory, which has settings of its own and usually no huge pages.
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE
    return whole[begin : begin + num_bytes].view(dtype).view(shape)
