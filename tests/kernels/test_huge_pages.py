"""Zeros that begin at a huge page, take no memory until they are written, and live as long as any view of them."""

import gc

import psutil
import pytest
import torch

from raytroupe.kernels import huge_pages
from raytroupe.kernels.huge_pages import HUGE_PAGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(0,), (5, 3), (3, HUGE_PAGE // 4 + 5), (HUGE_PAGE,)])
def test_zeros_of_any_shape(shape, dtype):
    zeros = huge_pages.zeros(shape, dtype)
    assert zeros.shape == shape
    assert zeros.dtype == dtype
    assert zeros.is_contiguous()
    assert not zeros.any()
    zeros.fill_(1)
    assert zeros.all()


def test_large_ones_begin_at_a_huge_page():
    large = huge_pages.zeros((HUGE_PAGE // 4 + 1,), torch.float32)
    assert large.data_ptr() % HUGE_PAGE == 0
    large[-1] = 1.0  # the end is there too


def test_memory_is_taken_when_it_is_written():
    process, size = psutil.Process(), 128 * 1024 * 1024
    before = process.memory_info().rss
    zeros = huge_pages.zeros((size,), torch.uint8)
    assert process.memory_info().rss - before < size // 8
    zeros[: size // 2].fill_(1)
    assert process.memory_info().rss - before > size // 4


def test_a_view_keeps_the_memory_and_the_last_one_frees_it():
    process, size = psutil.Process(), 128 * 1024 * 1024
    view = huge_pages.zeros((2, size), torch.uint8)[1]
    view.fill_(7)
    gc.collect()
    assert (view == 7).all()
    before = process.memory_info().rss
    del view
    gc.collect()
    assert process.memory_info().rss < before - size // 2
