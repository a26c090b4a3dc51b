"""The plan for the node that this process is on, claiming one of the sets of CPUs that it offers, and pinning."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path

from .cpu_plan import CpuPlan, plan_cpus
from .cpu_topology import read_topology

_TASKS = Path("/proc/self/task")


def plan_this_node(*, shards: int, num_threads: int | None = None, alone: bool = False) -> CpuPlan:
    """`plan_cpus` for the CPUs and the environment of this process, which must not have been pinned yet."""
    return plan_cpus(read_topology(), shards=shards, num_threads=num_threads, alone=alone, variables=list(os.environ))


class CpuClaims:
    """The CPUs that this process has for itself, as far as processes go that claim theirs in the same way.

    A claim on a CPU is a socket bound to its name in Linux's abstract namespace: a name has one owner on a node,
    whatever cluster or user that belongs to, and is free again at once when the owner ends, however it ends.
    """

    def __init__(self, prefix: str = "raytroupe-cpu-") -> None:
        self._prefix = prefix
        self._sockets: list[socket.socket] = []

    def take(self, choices: Iterable[tuple[int, ...]]) -> tuple[int, ...] | None:
        """Claim the first of `choices` that nobody holds a CPU of; None: there is no such."""
        for cpus in choices:
            if self._take_all(cpus):
                return cpus
        return None

    def release(self) -> None:
        """Give up all claims."""
        for held in self._sockets:
            held.close()
        self._sockets.clear()

    def _take_all(self, cpus: tuple[int, ...]) -> bool:
        with contextlib.ExitStack() as undo:
            taken = []
            for cpu in cpus:
                claim = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
                try:
                    claim.bind(f"\0{self._prefix}{cpu}")
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        return False
                    raise
                taken.append(claim)
            undo.pop_all()
        self._sockets += taken
        return True


def pin_process(cpus: Iterable[int]) -> bool:
    """Let all threads of this process, and those that they start from now on, run on `cpus` only; whether that worked.
    It does not where the system knows no affinity or the administrator has taken the CPUs away."""
    allowed = set(cpus)
    try:
        for task in _TASKS.iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(task.name), allowed)
    except (OSError, AttributeError):
        return False
    return True


def pin_thread(cpus: Iterable[int]) -> bool:
    """The same for the calling thread only, and those that it starts from now on."""
    try:
        os.sched_setaffinity(0, set(cpus))
    except (OSError, AttributeError):
        return False
    return True


def keep_off_shards(plan: CpuPlan) -> None:
    """Leave the shards' CPUs to them: for every process that is not a shard. Nothing where shards are not pinned."""
    if plan.choices and plan.rest:
        pin_process(plan.rest)
