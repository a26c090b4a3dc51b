"""Makes the modules in `tests/` importable from every test folder, and shares the shard processes among all tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def shard_processes():
    """`ProcessShards` (tests/shard_processes.py): processes start when a test asks for a replica of that size."""
    from shard_processes import ProcessShards

    processes = ProcessShards()
    yield processes
    processes.close()
