"""The shard's process before it has a model."""

from __future__ import annotations

import subprocess
import sys

import pytest

from raytroupe.actors.shard_group import describe_cpus


@pytest.mark.parametrize("module", ["shard_actor", "local_engine"])
def test_torch_is_imported_later(module: str) -> None:
    """OpenMP reads its variables once, when torch is imported; they are set when the shard is made."""
    program = f"import sys; import raytroupe.actors.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_shards_that_say_the_same_of_their_cpus_say_it_once() -> None:
    assert describe_cpus(["same", "other", "same", "same"]) == ["shards 0,2-3: same", "shard 1: other"]
    assert describe_cpus([None, None]) == []
