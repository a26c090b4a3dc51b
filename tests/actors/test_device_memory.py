"""Free memory under control groups of both versions, on this machine, and of a GPU around a step."""

import psutil
import pytest
from fake_gpu import FakeGpu, GiB

from raytroupe.actors.device_memory import container_memory, measure_node, measure_step
from raytroupe.cluster.kv_memory import CUDA_RESERVE


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
    memory = measure_node(weight_bytes=123)
    assert (memory.device, memory.weights) == ("cpu", 123)
    assert 0 < memory.free <= memory.total <= psutil.virtual_memory().total


def test_a_step_takes_its_peak_and_what_libraries_keep():
    gpu = FakeGpu(libraries=2 * GiB, tensors=15 * GiB, cached=3 * GiB)

    def step() -> None:
        gpu.take(4 * GiB, libraries=GiB)  # a communicator is made
        gpu.drop(3 * GiB)
        gpu.take(GiB)
        gpu.drop(2 * GiB)

    memory = measure_step(gpu, step, weight_bytes=14 * GiB)
    assert (memory.device, memory.total, memory.weights) == ("cuda", 80 * GiB, 14 * GiB)
    assert memory.free == (80 - 2 - 15) * GiB  # what loading left in the allocator has been given back
    assert memory.step == 5 * GiB
    assert memory.reserve == CUDA_RESERVE
    assert gpu.cached == 0  # and so the cache finds all that is not used
    assert gpu.read().free == memory.free - GiB


def test_what_a_step_keeps_is_not_counted_twice():
    """A workspace that stays: with a cache of `usable` bytes and the same step again, exactly the reserve is left."""
    gpu = FakeGpu(libraries=GiB, tensors=10 * GiB, cached=0)
    memory = measure_step(gpu, lambda: gpu.take(2 * GiB), weight_bytes=10 * GiB)
    gpu.take(memory.usable(1.0))
    assert gpu.read().free == CUDA_RESERVE


def test_memory_that_another_process_gives_back_meanwhile_is_not_counted_on():
    gpu = FakeGpu(libraries=9 * GiB, tensors=GiB, cached=0)

    def step() -> None:
        gpu.take(GiB, libraries=-5 * GiB)
        gpu.drop(GiB)

    memory = measure_step(gpu, step, weight_bytes=GiB)
    assert (memory.free, memory.step) == (70 * GiB, GiB)
