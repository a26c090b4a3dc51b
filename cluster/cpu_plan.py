"""How the shards of a node divide its CPUs among them, and what they leave to the rest.

```
8 cores, 2 shards:   0 1      2 3 4      5 6 7        64 CPUs, quota 3.5:   all of them for everybody; 3 threads
                     rest     shard      shard
```

A step is as slow as its slowest thread, so a thread that the ingress or another shard pushes from its CPU holds up all
others. Where there are enough cores every shard has some of its own: one thread per core (a second hyper-thread adds
nothing to memory bandwidth or matrix units), from one NUMA node if they fit. On small machines that would leave CPUs
idle which somebody needs; there the kernel's scheduler decides, and threads that wait do not spin for long.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from .cpu_topology import Cpu, CpuTopology, format_cpus

PIN_CORES = 8
"""Cores from which on shards get some of their own: one in eight is left to the rest then."""
MOST_REST_CORES = 2
"""The ingress, the scheduler, the proxy and Ray need no more."""
NODE_SHARE = 0.75
"""A shard gets this much less than an even share rather than cores of two NUMA nodes."""
AFFINITY_VARIABLES = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
"""A user who sets one of them has decided where threads run."""
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""A user who sets one of them has decided how threads wait."""

_Core = tuple[Cpu, ...]


class CpuPlan(msgspec.Struct, frozen=True):
    """What one shard's process does, one of several on a node with the same plan."""

    threads: int
    """That compute."""
    choices: tuple[tuple[int, ...], ...]
    """Sets of CPUs without a common member, one per shard; a process takes one. Empty: no pinning."""
    usable: tuple[int, ...]
    """All CPUs of the node that may be used."""
    rest: tuple[int, ...]
    """CPUs for all other processes: those that are in nobody's set."""
    reason: str
    """Why there is no pinning, or what is left to the rest."""
    bound_spin: bool
    """Whether a waiting thread shall sleep soon, because somebody else may need its CPU."""

    def explain(self, taken: Sequence[int] | None) -> str:
        """What was chosen, in one sentence; `taken` is the choice that this process got, None: it got none."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        if taken is not None:
            return f"{threads} pinned to CPUs {format_cpus(taken)}; {self.reason}"
        why = "other processes have taken these CPUs already" if self.choices else self.reason
        return f"{threads} on CPUs {format_cpus(self.usable)}, not pinned: {why}"


def plan_cpus(
    topology: CpuTopology,
    *,
    shards: int,
    num_threads: int | None = None,
    alone: bool = False,
    variables: Sequence[str] = (),
) -> CpuPlan:
    """Divide a node's CPUs.

    Args:
        shards: on this node, of all models and replicas.
        num_threads: that the user asks for; None: as many as a shard has cores.
        alone: the shard is in a process of somebody else's, without ingress and proxy beside it.
        variables: names of the environment variables that the user has set.
    """
    cores = topology.cores
    rest_cores = 0 if len(cores) < PIN_CORES else min(MOST_REST_CORES, len(cores) // PIN_CORES)
    shares = _divide(cores[rest_cores:], shards)
    shared_threads = max(1, min(topology.capacity, len(cores)) // shards)
    usable = tuple(sorted(cpu.id for cpu in topology.cpus))
    bound_spin = not any(name in SPIN_VARIABLES for name in variables)

    def unpinned(reason: str) -> CpuPlan:
        threads = num_threads or shared_threads
        return CpuPlan(threads, (), usable, usable, reason, bound_spin and threads > 1)

    if alone:
        return unpinned("the process is not a shard's own")
    chosen = [name for name in AFFINITY_VARIABLES if name in variables]
    if chosen:
        return unpinned(f"{chosen[0]} is set")
    if topology.limited:
        return unpinned(f"a control group limits them to {topology.quota:g} CPUs' time")
    if shards > len(cores):
        return unpinned(f"{shards} shards, the ingress and the scheduler share them")
    if not rest_cores:
        others = "the ingress and the scheduler" if shards == 1 else f"{shards} shards, the ingress and the scheduler"
        return unpinned(f"{others} share them")
    if not shares:
        return unpinned(f"{shards} shards leave none to the ingress and the scheduler")
    if num_threads is not None and num_threads > min(sum(map(len, share)) for share in shares):
        return unpinned(f"a shard's share of them is less than {num_threads}")

    threads = num_threads or min(map(len, shares))
    in_shares = {cpu.id for share in shares for core in share for cpu in core}
    rest = tuple(number for number in usable if number not in in_shares)
    choices = tuple(_cpus_for(share, threads) for share in shares)
    return CpuPlan(threads, choices, usable, rest, _left_over(rest, shares), bound_spin=False)


def _divide(cores: Sequence[_Core], shards: int) -> list[list[_Core]]:
    """Equally many cores for every shard, of one NUMA node each if it costs no more than `NODE_SHARE` allows; empty if
    there are fewer cores than shards."""
    even = len(cores) // shards
    if not even:
        return []
    nodes: dict[int, list[_Core]] = {}
    for core in cores:
        nodes.setdefault(core[0].node, []).append(core)
    for size in range(even, 0, -1):
        if size < even * NODE_SHARE:
            break
        if sum(len(node) // size for node in nodes.values()) >= shards:
            shares = [node[start : start + size] for node in nodes.values() for start in range(0, len(node), size)]
            return [share for share in shares if len(share) == size][:shards]
    return [list(cores[start : start + even]) for start in range(0, even * shards, even)]


def _cpus_for(share: Sequence[_Core], threads: int) -> tuple[int, ...]:
    """One CPU per thread: first one of every core, then further hyper-threads."""
    by_sibling = [core[sibling] for sibling in range(max(map(len, share))) for core in share if sibling < len(core)]
    return tuple(sorted(cpu.id for cpu in by_sibling[:threads]))


def _left_over(rest: Sequence[int], shares: Sequence[Sequence[_Core]]) -> str:
    text = f"CPUs {format_cpus(rest)} are left to the ingress and the scheduler"
    if any(share[0][0].node != share[-1][0].node for share in shares):
        text += "; a shard has CPUs of several NUMA nodes, which a shard per node (-tp) would avoid"
    return text
