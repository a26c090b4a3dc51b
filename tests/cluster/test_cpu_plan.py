"""How shards divide the CPUs of machines of many shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytroupe.cluster.cpu_plan import AFFINITY_VARIABLES, PIN_CORES, CpuPlan, plan_cpus
from raytroupe.cluster.cpu_topology import Cpu, CpuTopology


def machine(
    cores: int, *, nodes: int = 1, siblings: int = 1, mask: range | None = None, quota: float | None = None
) -> CpuTopology:
    """`cores` in all, numbered over the nodes as Linux does: first one hyper-thread of every core, then the others."""
    cpus = [
        Cpu(node=core * nodes // cores, core=core, id=core + sibling * cores)
        for core in range(cores)
        for sibling in range(siblings)
    ]
    return CpuTopology(tuple(sorted(cpu for cpu in cpus if mask is None or cpu.id in mask)), quota)


def ids(*runs: tuple[int, int]) -> tuple[int, ...]:
    """Numbers from the first to the last of every run."""
    return tuple(number for first, last in runs for number in range(first, last + 1))


@pytest.mark.parametrize(
    ("topology", "shards", "choices", "rest"),
    [
        (machine(8), 1, [ids((1, 7))], (0,)),
        (machine(8), 2, [ids((1, 3)), ids((4, 6))], (0, 7)),
        (machine(16), 2, [ids((2, 8)), ids((9, 15))], (0, 1)),
        # One thread per core; the second hyper-threads of the shards' cores stay idle.
        (machine(8, siblings=2), 1, [ids((1, 7))], (0, 8)),
        (machine(64, nodes=2, siblings=2), 2, [ids((2, 31)), ids((32, 61))], (0, 1, 62, 63, 64, 65, 126, 127)),
        (machine(16, nodes=2), 4, [(2, 3, 4), (5, 6, 7), (8, 9, 10), (11, 12, 13)], (0, 1, 14, 15)),
        # A mask that the user has set: only what is in it.
        (machine(64, mask=range(1, 32, 2)), 2, [tuple(range(5, 19, 2)), tuple(range(19, 32, 2))], (1, 3)),
    ],
)
def test_shards_get_cores_of_their_own_where_there_are_enough(
    topology: CpuTopology, shards: int, choices: list[tuple[int, ...]], rest: tuple[int, ...]
) -> None:
    plan = plan_cpus(topology, shards=shards)
    assert list(plan.choices) == choices
    assert plan.rest == rest
    assert plan.threads == len(choices[0])
    assert not plan.bound_spin


@pytest.mark.parametrize(
    ("topology", "shards", "num_threads", "threads", "explanation"),
    [
        (machine(2), 1, None, 2, "2 threads on CPUs 0-1, not pinned: the ingress and the scheduler share them"),
        (
            machine(2),
            4,
            None,
            1,
            "1 thread on CPUs 0-1, not pinned: 4 shards, the ingress and the scheduler share them",
        ),
        (
            machine(6),
            2,
            None,
            3,
            "3 threads on CPUs 0-5, not pinned: 2 shards, the ingress and the scheduler share them",
        ),
        (
            machine(1, siblings=2),
            1,
            None,
            1,
            "1 thread on CPUs 0-1, not pinned: the ingress and the scheduler share them",
        ),
        (
            machine(64, quota=3.5),
            1,
            None,
            3,
            "3 threads on CPUs 0-63, not pinned: a control group limits them to 3.5 CPUs' time",
        ),
        (
            machine(64, quota=0.5),
            2,
            None,
            1,
            "1 thread on CPUs 0-63, not pinned: a control group limits them to 0.5 CPUs' time",
        ),
        (
            machine(8),
            8,
            None,
            1,
            "1 thread on CPUs 0-7, not pinned: 8 shards leave none to the ingress and the scheduler",
        ),
        (machine(8), 1, 8, 8, "8 threads on CPUs 0-7, not pinned: a shard's share of them is less than 8"),
        (
            machine(2, mask=range(1, 2)),
            1,
            None,
            1,
            "1 thread on CPUs 1, not pinned: the ingress and the scheduler share them",
        ),
    ],
)
def test_shards_are_not_pinned_and_the_reason_is_said(
    topology: CpuTopology, shards: int, num_threads: int | None, threads: int, explanation: str
) -> None:
    plan = plan_cpus(topology, shards=shards, num_threads=num_threads)
    assert plan.choices == ()
    assert plan.rest == plan.usable
    assert plan.threads == threads
    assert plan.bound_spin == (threads > 1)
    assert plan.explain(None) == explanation


def test_a_quota_of_all_cpus_is_no_limit() -> None:
    assert plan_cpus(machine(8, quota=8.0), shards=1).choices == (ids((1, 7)),)


def test_a_user_may_ask_for_fewer_threads() -> None:
    plan = plan_cpus(machine(16), shards=1, num_threads=4)
    assert plan.choices == (ids((2, 5)),)
    assert plan.rest == (0, 1), "other shards may use all of their share"


def test_a_user_may_ask_for_the_second_hyper_threads() -> None:
    plan = plan_cpus(machine(8, siblings=2), shards=1, num_threads=10)
    assert plan.choices == ((*ids((1, 7)), 9, 10, 11),)


def test_one_shard_of_a_machine_with_two_nodes_is_told_of_the_other_way() -> None:
    plan = plan_cpus(machine(32, nodes=2), shards=1)
    assert plan.choices == (ids((2, 31)),)
    assert plan.explain(plan.choices[0]) == (
        "30 threads pinned to CPUs 2-31; CPUs 0-1 are left to the ingress and the scheduler; a shard has CPUs of "
        "several NUMA nodes, which a shard per node (-tp) would avoid"
    )


@pytest.mark.parametrize("name", AFFINITY_VARIABLES)
def test_a_users_own_placement_of_threads_stands(name: str) -> None:
    plan = plan_cpus(machine(16), shards=1, variables=["PATH", name])
    assert plan.choices == ()
    assert f"{name} is set" in plan.explain(None)


def test_a_users_own_way_of_waiting_stands() -> None:
    assert plan_cpus(machine(2), shards=1, variables=["PATH"]).bound_spin
    assert not plan_cpus(machine(2), shards=1, variables=["OMP_WAIT_POLICY"]).bound_spin


def test_a_process_of_somebody_elses_is_left_where_it_is() -> None:
    plan = plan_cpus(machine(16), shards=1, alone=True)
    assert (plan.threads, plan.choices) == (16, ())


def test_a_shard_that_comes_too_late_says_so() -> None:
    assert plan_cpus(machine(8), shards=1).explain(None) == (
        "7 threads on CPUs 0-7, not pinned: other processes have taken these CPUs already"
    )


@st.composite
def machines(draw: st.DrawFn) -> CpuTopology:
    whole = machine(draw(st.integers(1, 40)), nodes=draw(st.integers(1, 4)), siblings=draw(st.integers(1, 2)))
    cpus = draw(st.sets(st.sampled_from(whole.cpus), min_size=1))
    return CpuTopology(tuple(sorted(cpus)), draw(st.none() | st.floats(0.1, 100)))


@given(machines(), st.integers(1, 20), st.none() | st.integers(1, 30))
def test_every_plan_is_sound(topology: CpuTopology, shards: int, num_threads: int | None) -> None:
    plan = plan_cpus(topology, shards=shards, num_threads=num_threads)
    assert plan.threads == (num_threads or plan.threads) >= 1
    assert set(plan.usable) == {cpu.id for cpu in topology.cpus}
    if num_threads is None:
        assert plan.threads * shards <= topology.capacity or plan.threads == 1
    if plan.choices:
        check_pinned(plan, topology, shards)
    else:
        assert plan.rest == plan.usable


def check_pinned(plan: CpuPlan, topology: CpuTopology, shards: int) -> None:
    """Every shard has CPUs that nobody else has, one per thread."""
    assert len(topology.cores) >= PIN_CORES
    assert not topology.limited
    assert len(plan.choices) == shards
    taken = [number for choice in plan.choices for number in choice]
    assert len(taken) == len(set(taken)) == shards * plan.threads
    assert set(taken) <= set(plan.usable)
    core_of = {cpu.id: (cpu.node, cpu.core) for cpu in topology.cpus}
    assert plan.rest, "the ingress must run somewhere"
    assert {core_of[number] for number in plan.rest}.isdisjoint({core_of[number] for number in taken})
