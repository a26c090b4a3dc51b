"""Every instruction set of this machine, threads, and random numbers."""

from __future__ import annotations

import os
import zlib

import pytest
import torch

from raytroupe.kernels import native_library
from raytroupe.kernels.native_library import INSTRUCTION_SETS


def _has(name: str) -> bool:
    best = native_library.instruction_set()
    return INSTRUCTION_SETS.index(name) <= INSTRUCTION_SETS.index(best)


AVAILABLE = [name for name in INSTRUCTION_SETS if native_library.is_built() and _has(name)]


@pytest.fixture(params=AVAILABLE or [None])
def instruction_set(request):
    """Runs the test with each instruction set of this machine; skips it if nothing was compiled."""
    if request.param is None:
        pytest.skip("the kernels were not compiled: there was no C++ compiler at installation")
    best = native_library.instruction_set()
    native_library.use_instruction_set(request.param)
    yield request.param
    native_library.use_instruction_set(best)


@pytest.fixture(autouse=True)
def _threads():
    """A test may set the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator(request):
    """Seeded by the test's own name, so that a failure comes from a change and not from the day. TROUPE_TEST_SEED=N
    gives every test other numbers."""
    seed = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("TROUPE_TEST_SEED", "0"))
    return torch.Generator().manual_seed(seed)
