"""What a machine's /sys and control groups say, read from small trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytroupe.cluster.cpu_topology import Cpu, format_cpus, read_topology


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


SYSTEM = {
    "sys/devices/system/node/node0/cpulist": "0-1,4-5",
    "sys/devices/system/node/node1/cpulist": "2-3,6-7",
    **{
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)
    },
}


def test_cores_and_nodes_are_found(tmp_path: Path) -> None:
    write(tmp_path, SYSTEM)
    topology = read_topology(range(8), tmp_path)
    assert [[cpu.id for cpu in core] for core in topology.cores] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [core[0].node for core in topology.cores] == [0, 0, 1, 1]
    assert topology.quota is None
    assert topology.capacity == 8


def test_only_the_affinity_mask_counts(tmp_path: Path) -> None:
    write(tmp_path, SYSTEM)
    topology = read_topology([6, 5], tmp_path)
    assert topology.cpus == (Cpu(node=0, core=1, id=5), Cpu(node=1, core=2, id=6))


def test_a_system_that_says_nothing_has_one_node_and_no_hyper_threads(tmp_path: Path) -> None:
    topology = read_topology([0, 3], tmp_path)
    assert topology.cpus == (Cpu(node=0, core=0, id=0), Cpu(node=0, core=3, id=3))
    assert not topology.limited


@pytest.mark.parametrize(
    ("files", "quota", "capacity"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "350000 100000"}, 3.5, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None, 6),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "900000 100000"}, 9.0, 6),
        # The tightest of the groups around the process, wherever it is.
        (
            {
                "proc/self/cgroup": "0::/user/job",
                "sys/fs/cgroup/user/cpu.max": "200000 100000",
                "sys/fs/cgroup/user/job/cpu.max": "400000 100000",
            },
            2.0,
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n3:memory:/job\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            2.5,
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/of/the/host",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
            6,
        ),
    ],
)
def test_quota_of_the_control_groups(tmp_path: Path, files: dict[str, str], quota: float | None, capacity: int) -> None:
    write(tmp_path, files)
    topology = read_topology(range(6), tmp_path)
    assert topology.quota == quota
    assert topology.capacity == capacity
    assert topology.limited == (quota is not None and quota < 6)


def test_numbers_are_written_as_linux_does() -> None:
    assert format_cpus([8, 0, 1, 2, 3]) == "0-3,8"
    assert format_cpus([5]) == "5"
    assert format_cpus([]) == ""
