"""What a shard's process tells OpenMP before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from raytroupe.actors.shard_actor import SPIN_COUNT, _omp_environment

SPIN = {"GOMP_SPINCOUNT": str(SPIN_COUNT)}


@pytest.mark.parametrize(
    ("num_threads", "shards_per_node", "cores", "spin"),
    [
        (1, 1, 2, {}),  # nobody to wait for
        (2, 1, 2, SPIN),  # shares the cores with the scheduler and the ingress
        (8, 1, 16, {}),
        (8, 2, 16, SPIN),
    ],
)
def test_waiting_threads_spin_briefly_where_cores_are_shared(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, shards_per_node: int, cores: int, spin: dict[str, str]
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert _omp_environment(num_threads, shards_per_node) == {"OMP_NUM_THREADS": str(num_threads), **spin}


def test_a_users_own_choice_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert _omp_environment(2, 4) == {"OMP_NUM_THREADS": "2"}


def test_torch_is_imported_later() -> None:
    """OpenMP reads its variables once, when torch is imported; the actor sets them when it is made."""
    program = "import sys; import raytroupe.actors.shard_actor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
