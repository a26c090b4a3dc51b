"""What this machine has to offer, found out without importing ray or torch."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
from pathlib import Path

from ..actors.placement import Capacity
from ..cluster.config import ServeConfig
from ..cluster.cpu_topology import read_topology
from ..cluster.errors import ConfigError

DASHBOARD_HOST = "127.0.0.1"
"""Ray's dashboard runs code for whoever has its token, so it is for this machine only."""

_QUIET_PORTS = range(20_000, 30_000)
"""Between the ports of Ray's workers (10,002 to 19,999) and those that Serve and the kernel (from 32,768) give to
whoever asks for any: Ray's processes take many of the latter between our choice and the moment in which it is used."""

_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


def local_capacity() -> Capacity:
    """CPUs that this process may use, and NVIDIA GPUs that it may see."""
    return Capacity(cpus=float(read_topology().capacity), gpus=float(_gpus()))


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that are free on all interfaces now, in no order."""
    found: list[int] = []
    for port in random.sample(_QUIET_PORTS, len(_QUIET_PORTS)):
        if len(found) == count:
            break
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
    return found


def check_ports(config: ServeConfig) -> ServeConfig:
    """The configuration with ports that the API and the dashboard can listen on. A dashboard port that the user did
    not choose gives way to another one.

    Raises:
        ConfigError: one cannot be listened on; says why, and which option to change.
    """
    try:
        _try_to_listen(config.host, config.port)
    except socket.gaierror as error:
        raise ConfigError(
            f"host {config.host!r} cannot be resolved ({error.strerror}); give an address of this machine with --host"
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"host {config.host!r} is no address of this machine; choose one with --host") from None
        raise ConfigError(f"{_refusal(config.host, config.port, error)}; choose another with --port") from None
    try:
        _try_to_listen(DASHBOARD_HOST, config.dashboard_port)
    except OSError as error:
        if "dashboard_port" not in config.model_fields_set:
            another = next(port for port in free_ports(2) if port != config.port)
            return config.model_copy(update={"dashboard_port": another})
        refusal = _refusal(DASHBOARD_HOST, config.dashboard_port, error)
        raise ConfigError(f"{refusal}; choose another for Ray's dashboard with --dashboard-port") from None
    return config


def _try_to_listen(host: str, port: int) -> None:
    """Raise OSError unless a server could listen there."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _refusal(host: str, port: int, error: OSError) -> str:
    reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be listened on ({error.strerror})"
    return f"port {port} of {host} {reason}"


def _gpus() -> int:
    present = len(list(_NVIDIA_GPUS.iterdir())) if _NVIDIA_GPUS.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
