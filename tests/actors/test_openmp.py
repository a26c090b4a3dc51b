"""What OpenMP is told before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from raytroupe.actors.openmp import SPIN_COUNT, bound_spinning, environment
from raytroupe.cluster.cpu_plan import CpuPlan


def plan(*, threads: int, bound_spin: bool) -> CpuPlan:
    return CpuPlan(threads, (), (0, 1), (0, 1), "", bound_spin)


@pytest.mark.parametrize(("bound_spin", "spin"), [(True, {"GOMP_SPINCOUNT": str(SPIN_COUNT)}), (False, {})])
def test_waiting_threads_spin_briefly_where_cores_are_shared(bound_spin: bool, spin: dict[str, str]) -> None:
    assert environment(plan(threads=2, bound_spin=bound_spin)) == {"OMP_NUM_THREADS": "2", **spin}


def test_torch_follows_the_plan_and_the_environment_stays_as_it_was() -> None:
    program = """
import os
from raytroupe.actors.openmp import import_torch
from raytroupe.cluster.cpu_plan import CpuPlan
os.environ["OMP_NUM_THREADS"] = "2"
before = dict(os.environ)
import_torch(CpuPlan(1, (), (0,), (0,), "", False))
assert dict(os.environ) == before
import torch
assert torch.get_num_threads() == 1
import_torch(CpuPlan(2, (), (0,), (0,), "", True))
assert torch.get_num_threads() == 1, "too late"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(("given", "bound"), [(None, SPIN_COUNT), ("7", 7)])
def test_a_program_bounds_its_spinning_unless_it_was_told_how(
    given: str | None, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if given is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    bound_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == str(bound)
