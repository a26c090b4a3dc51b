"""What OpenMP, which computes for torch and for our kernels on CPUs, is told before torch is imported."""

from __future__ import annotations

import importlib
import os
import sys

from ..cluster.cpu_plan import CpuPlan

SPIN_COUNT = 100_000
"""Turns of libgomp's waiting loop before a thread sleeps, where others want its core: tenths of a millisecond."""


def environment(plan: CpuPlan) -> dict[str, str]:
    """Variables for a process that computes as `plan` says.

    A thread of libgomp that waits for the others spins first, for milliseconds unless it knows that there are more
    threads than cores, which it can tell for its own process only. If another process needs the core meanwhile, the
    spinning takes it from the very thread that is waited for. So it is bounded where others share the cores; on
    cores of its own, where spinning is what makes small products fast, a shard keeps libgomp's bound.
    """
    variables = {"OMP_NUM_THREADS": str(plan.threads)}
    if plan.bound_spin:
        variables["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    return variables


def bound_spinning() -> None:
    """For a program that shares its cores with others and has not imported torch yet: with libgomp's own bound, many
    small operations take twenty times as long on two cores of which one is busy."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def import_torch(plan: CpuPlan) -> None:
    """Import torch in a process that may hold other things than a shard: its environment stays as it was. OpenMP
    reads the variables once, so that nothing happens if torch is there already."""
    if "torch" in sys.modules:
        return
    before = dict(os.environ)
    os.environ.update(environment(plan))
    try:
        importlib.import_module("torch")
    finally:
        for name in environment(plan):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
