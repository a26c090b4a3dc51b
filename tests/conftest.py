"""Makes the modules in `tests/` importable from every test folder, and shares the shard processes among all tests."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, so that a failure comes from a change and not from the day:
# `--hypothesis-profile=default` looks for others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# Before torch is imported: on tiny models a second thread costs more than it computes, and far more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before ray is imported: `troupe serve` starts Ray with token authentication, and the tests look into that cluster.
os.environ.setdefault("RAY_AUTH_MODE", "token")

# Before triton is imported: without a GPU its kernels run under the interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def single_thread():
    """torch computes in one thread, whatever tests before have set: a tiny model has no work for two."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shard_processes():
    """`ProcessShards` (tests/shard_processes.py): processes start when a test asks for a replica of that size."""
    from shard_processes import ProcessShards

    processes = ProcessShards()
    yield processes
    processes.close()
