"""What a shard's device has left: the node's available memory within the container's limit, or a GPU's free memory and
what a step was measured to take of it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil
import torch

from ..cluster.kv_memory import CUDA_RESERVE, DeviceMemory


def measure_node(weight_bytes: int) -> DeviceMemory:
    """Memory of this node now. `weight_bytes` of this shard's weights are loaded already and reported along."""
    node = psutil.virtual_memory()
    limit, headroom = container_memory()
    return DeviceMemory("cpu", min(node.total, limit), min(node.available, headroom), weight_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class GpuReading:
    """Memory of one GPU at one moment. Bytes."""

    total: int
    free: int
    """As the driver says: what any process or library holds is not."""
    reserved: int
    """What torch's allocator has taken from the device, in use or not."""
    peak_reserved: int
    """The most that it had since the last `release`."""


class Gauge(Protocol):
    """Reads the memory of a GPU."""

    def release(self) -> None:
        """Give back to the device what torch's allocator holds and nobody uses, and forget the peak."""

    def read(self) -> GpuReading:
        """After all work that was launched."""


class CudaGauge:
    """`Gauge` of a device of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def release(self) -> None:
        gc.collect()  # a cycle may keep a tensor
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> GpuReading:
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        return GpuReading(total, free, reserved, torch.cuda.max_memory_reserved(self._device))


def measure_step(gauge: Gauge, run_step: Callable[[], object], weight_bytes: int) -> DeviceMemory:
    """A GPU's memory before `run_step`, and what that took at its peak.

    Counted are torch's tensors with the fragments between them, and what libraries took for themselves and keep:
    communicators, workspaces, the code of kernels that were loaded. All that torch no longer uses is given back, so
    that the cache finds it.
    """
    gauge.release()
    before = gauge.read()
    run_step()
    after = gauge.read()
    gauge.release()
    # Another process may have given memory back meanwhile; it is not ours to count on.
    kept_by_libraries = max(0, (before.free - after.free) - (after.reserved - before.reserved))
    step = after.peak_reserved - before.reserved + kept_by_libraries
    return DeviceMemory("cuda", before.total, before.free, weight_bytes, step, CUDA_RESERVE)


def container_memory(
    memberships: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> tuple[int, int]:
    """(limit, what is left of it) in bytes of the tightest control group around this process, version 1 or 2.

    Groups without a limit, and systems without control groups, give numbers too large to matter.
    """
    limit = headroom = 2**63
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        return limit, headroom
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_file, usage_file, cache_key = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cache_key = mount / "memory", "total_inactive_file"
            limit_file, usage_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.strip("/")
        # Inside a container its own group is mounted as the root, and the path is that of the host.
        for group in (own, *own.parents[: len(own.parents) - len(root.parents)]):
            group_limit = _number(group / limit_file)
            if group_limit is None:
                continue
            # File pages that were not used lately are given up before anything is refused.
            used = (_number(group / usage_file) or 0) - _entry(group / "memory.stat", cache_key)
            limit = min(limit, group_limit)
            headroom = min(headroom, max(0, group_limit - used))
    return limit, headroom


def _number(file: Path) -> int | None:
    """The file's only number; None without the file or if it says "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _entry(file: Path, key: str) -> int:
    """One line of a `key value` file; 0 without it."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
