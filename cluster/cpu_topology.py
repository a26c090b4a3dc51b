"""The CPUs that a process may use: which of them are one core, which share a NUMA node, and how much time they get."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec


class Cpu(msgspec.Struct, frozen=True, order=True):
    """A logical CPU."""

    node: int
    """NUMA node; its memory is near."""
    core: int
    """The lowest CPU of its core: the same number for the hyper-threads of one core."""
    id: int
    """As `sched_setaffinity` has it."""


class CpuTopology(msgspec.Struct, frozen=True):
    """The usable part of a machine."""

    cpus: tuple[Cpu, ...]
    """Those in this process's affinity mask, in order of node, core and id."""
    quota: float | None = None
    """CPUs' worth of time that the control groups around the process allow; None: no limit."""

    @property
    def cores(self) -> tuple[tuple[Cpu, ...], ...]:
        """The hyper-threads of every core, in order."""
        cores: dict[tuple[int, int], list[Cpu]] = {}
        for cpu in self.cpus:
            cores.setdefault((cpu.node, cpu.core), []).append(cpu)
        return tuple(tuple(core) for core in cores.values())

    @property
    def limited(self) -> bool:
        """Whether the quota allows less than all CPUs at once."""
        return self.quota is not None and self.quota < len(self.cpus)

    @property
    def capacity(self) -> int:
        """CPUs that can compute at the same time; at least 1."""
        if self.quota is None:
            return len(self.cpus)
        return max(1, min(len(self.cpus), int(self.quota)))


def read_topology(usable: Iterable[int] | None = None, root: Path = Path("/")) -> CpuTopology:
    """The CPUs of this process; `usable` stands in for its affinity mask.

    What the system does not say counts as the simplest case: one hyper-thread per core, one node, no quota.
    """
    ids = sorted(_affinity() if usable is None else usable)
    system = root / "sys/devices/system"
    node_of = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in (system / "node").glob("node[0-9]*")
        for cpu in _parse_cpus(_read(folder / "cpulist"))
    }
    cpus = []
    for number in ids:
        siblings = _parse_cpus(_read(system / f"cpu/cpu{number}/topology/thread_siblings_list"))
        cpus.append(Cpu(node=node_of.get(number, 0), core=min([number, *siblings]), id=number))
    return CpuTopology(tuple(sorted(cpus)), _quota(root / "proc/self/cgroup", root / "sys/fs/cgroup"))


def format_cpus(ids: Iterable[int]) -> str:
    """CPU numbers as Linux writes them: 0-3,8."""
    runs: list[list[int]] = []
    for number in sorted(ids):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _affinity() -> Iterable[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)  # systems without affinity


def _parse_cpus(text: str) -> list[int]:
    """The numbers of a list such as 0-3,8; none if it is empty."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found += range(int(first), int(last or first) + 1)
    return found


def _quota(memberships: Path, mount: Path) -> float | None:
    """CPUs' worth of time that the tightest control group around this process gets, of version 1 or 2."""
    tightest: float | None = None
    for line in _read(memberships).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [mount]
        elif "cpu" in controllers.split(","):
            roots = [mount / "cpu", mount / controllers]
        else:
            continue
        for root in roots:
            own = root / path.strip("/")
            # Inside a container its own group is mounted as the root, and the path is that of the host.
            for group in (own, *own.parents[: len(own.parents) - len(root.parents)]):
                limit = _group_quota(group)
                if limit is not None:
                    tightest = limit if tightest is None else min(tightest, limit)
    return tightest


def _group_quota(group: Path) -> float | None:
    """One group's own limit, in CPUs."""
    text = _read(group / "cpu.max") or f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
    try:
        quota, period = (int(word) for word in text.split())
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(file: Path) -> str:
    """Its text; empty if it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""
