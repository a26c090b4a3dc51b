"""Free memory under control groups of both versions, and on this machine."""

import psutil
import pytest
import torch

from raytroupe.actors.device_memory import container_memory, measure

GiB = 2**30


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_tightest_group_of_version_2_counts_and_idle_file_pages_are_free(tmp_path):
    memberships = tmp_path / "cgroup"
    memberships.write_text("0::/outer/inner\n")
    mount = tmp_path / "fs"
    write_group(mount / "outer/inner", memory__max="max", memory__current=GiB)
    write_group(
        mount / "outer",
        memory__max=8 * GiB,
        memory__current=5 * GiB,
        memory__stat=f"anon {3 * GiB}\ninactive_file {2 * GiB}\nactive_file 7",
    )
    assert container_memory(memberships, mount) == (8 * GiB, 5 * GiB)


def test_version_1_and_a_container_whose_group_is_the_mounted_root(tmp_path):
    memberships = tmp_path / "cgroup"
    memberships.write_text("5:cpuset:/x\n4:memory:/docker/0123\n0::/\n")
    mount = tmp_path / "fs"
    write_group(mount / "memory", memory__limit_in_bytes=4 * GiB, memory__usage_in_bytes=GiB)
    assert container_memory(memberships, mount) == (4 * GiB, 3 * GiB)


@pytest.mark.parametrize("text", [None, "0::/\n", "4:memory:/a\n0::/b\n"])
def test_no_limit_is_no_limit(tmp_path, text):
    memberships = tmp_path / "cgroup"
    if text is not None:
        memberships.write_text(text)
    assert container_memory(memberships, tmp_path / "fs") == (2**63, 2**63)


def test_this_machine_has_no_more_free_memory_than_it_has():
    memory = measure(torch.device("cpu"), weight_bytes=123)
    assert (memory.device, memory.weights) == ("cpu", 123)
    assert 0 < memory.free <= memory.total <= psutil.virtual_memory().total
