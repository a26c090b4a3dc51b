"""Claims on CPUs between processes, and pinning of real threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid

import pytest

from raytroupe.cluster.cpu_affinity import CpuClaims, pin_thread

CHOICES = [(1, 2), (3, 4)]


@pytest.fixture
def prefix() -> str:
    return f"raytroupe-test-{uuid.uuid4()}-"


def test_each_takes_another_set_until_none_is_left(prefix: str) -> None:
    first, second, third = (CpuClaims(prefix) for _ in range(3))
    assert first.take(CHOICES) == (1, 2)
    assert second.take(CHOICES) == (3, 4)
    assert third.take(CHOICES) is None
    first.release()
    assert third.take(CHOICES) == (1, 2)
    second.release()
    third.release()


def test_sets_of_another_division_are_taken_only_if_all_their_cpus_are_free(prefix: str) -> None:
    ours, theirs = CpuClaims(prefix), CpuClaims(prefix)
    assert ours.take([(2, 3)]) == (2, 3)
    assert theirs.take(CHOICES) is None
    assert theirs.take([(1,), (4,)]) == (1,), "a failed attempt holds nothing"
    ours.release()
    theirs.release()


def test_claims_end_with_their_process(prefix: str) -> None:
    program = f"""
import sys
from raytroupe.cluster.cpu_affinity import CpuClaims
claims = CpuClaims({prefix!r})
print(claims.take([(1, 2)]), flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "(1, 2)"
    claims = CpuClaims(prefix)
    assert claims.take([(1, 2)]) is None
    holder.kill()
    holder.communicate()
    assert claims.take([(1, 2)]) == (1, 2)
    claims.release()


def test_a_pinned_thread_hands_its_cpus_on_and_leaves_others_alone() -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    seen = []

    def pinned() -> None:
        assert pin_thread(one)
        child = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        child.start()
        child.join()

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    assert seen == [one]
    assert os.sched_getaffinity(0) == before


def test_keeping_off_the_shards_moves_every_thread() -> None:
    """In a process of its own, since pinning is for good."""
    program = """
import os, threading
from raytroupe.cluster.cpu_affinity import keep_off_shards
from raytroupe.cluster.cpu_plan import CpuPlan
usable = sorted(os.sched_getaffinity(0))
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
plan = CpuPlan(1, (), tuple(usable), tuple(usable[:1]), "", False)
keep_off_shards(plan)
assert os.sched_getaffinity(thread.native_id) == set(usable), "nobody is pinned"
keep_off_shards(CpuPlan(1, (tuple(usable[1:]),), tuple(usable), tuple(usable[:1]), "", False))
assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) == {usable[0]}
stop.set()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_cpus_that_are_not_there_pin_nothing() -> None:
    before = os.sched_getaffinity(0)
    assert not pin_thread({max(before) + 5000})
    assert os.sched_getaffinity(0) == before
