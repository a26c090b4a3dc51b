"""What a shard's device has left: CUDA's own figure, or the node's available memory within the container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from ..cluster.kv_memory import DeviceMemory


def measure(device: torch.device, weight_bytes: int) -> DeviceMemory:
    """Memory of `device` now. `weight_bytes` of this shard's weights are loaded already and reported along."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What torch's allocator has reserved and does not use is free for us.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return DeviceMemory("cuda", total, free, weight_bytes)
    node = psutil.virtual_memory()
    limit, headroom = container_memory()
    return DeviceMemory("cpu", min(node.total, limit), min(node.available, headroom), weight_bytes)


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
