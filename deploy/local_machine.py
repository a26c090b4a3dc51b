"""What this machine has to offer, found out without importing ray or torch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from ..actors.placement import Capacity

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


def local_capacity() -> Capacity:
    """CPUs that this process may use, and NVIDIA GPUs that it may see."""
    return Capacity(cpus=float(_cpus()), gpus=float(_gpus()))


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that are free on all interfaces now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _cpus() -> int:
    available = len(os.sched_getaffinity(0))
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return available
    return available if quota == "max" else max(1, min(available, int(quota) // int(period)))


def _gpus() -> int:
    present = len(list(_NVIDIA_GPUS.iterdir())) if _NVIDIA_GPUS.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
