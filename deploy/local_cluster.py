"""A Ray cluster on this machine that lives as long as the command that started it."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from ..actors.placement import Capacity
from ..cluster.errors import EngineError
from .local_machine import free_ports

_PR_SET_CHILD_SUBREAPER = 36
_OBJECT_STORE_BYTES = 128 * 2**20
"""Nothing large goes through Ray's object store; its default would reserve 30 % of the memory."""


class LocalCluster:
    """Starts Ray and ends every process of it, also if starting was interrupted.

    All files of the cluster are in one temporary folder, all ports that Ray does not choose itself are free ones, so
    that several clusters can run on one machine.
    """

    def __init__(self, capacity: Capacity, dashboard_port: int) -> None:
        self._capacity = capacity
        self._dashboard_port = dashboard_port
        # A folder with a short name: sockets lie below it, and their paths may have 107 bytes only.
        self.folder = Path(tempfile.mkdtemp(prefix="troupe-", dir="/tmp"))
        self._vital: list[psutil.Process] = []
        self.log = self.folder / "driver.log"
        self.address = ""
        """Of Ray's control store, for other drivers (`RAY_ADDRESS`)."""
        self.dashboard_url = ""

    def start(self) -> None:
        """Start Ray's processes; returns when this process is connected to them."""
        _adopt_orphans()
        os.environ.update(self._environment())
        import ray

        context = ray.init(
            address="local",
            num_cpus=int(self._capacity.cpus),
            num_gpus=int(self._capacity.gpus),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=self._dashboard_port,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            _temp_dir=str(self.folder / "ray"),
        )
        self.address = ray.get_runtime_context().gcs_address
        self.dashboard_url = f"http://{context.dashboard_url}"

    def check_alive(self) -> None:
        """
        Raises:
            EngineError: Ray has lost a process that it cannot do without.
        """
        for process in self._vital:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise EngineError(f"Ray is gone: process {process.pid} ended unexpectedly")

    def stop(self, *, keep_logs: bool = False) -> None:
        """End every process that this one started, directly or not, and remove the cluster's files."""
        import ray

        # Taken before, because what ends leaves its children to us (`_adopt_orphans`) in no particular order.
        family = psutil.Process().children(recursive=True)
        ray.shutdown()
        _end(family)
        _end(psutil.Process().children(recursive=True))
        if not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def token_command() -> str:
        """The command that prints the token which Ray's dashboard and API ask for."""
        return f"{Path(sys.executable).with_name('ray')} get-auth-token"

    def _environment(self) -> dict[str, str]:
        """Settings that Ray and Serve read when they are imported, here and in every process of the cluster."""
        haproxy = self.folder / "h"
        metrics_port, stats_port, fallback_http, fallback_grpc = map(str, free_ports(4))
        return {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, int(self._capacity.cpus) // 2))),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": metrics_port,
            "RAY_SERVE_HAPROXY_STATS_PORT": stats_port,
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": fallback_http,
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": fallback_grpc,
            "RAY_SERVE_LOG_TO_STDERR": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none is lost from sight (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end(processes: list[psutil.Process], grace_seconds: float = 3.0) -> None:
    """SIGTERM, and SIGKILL for those that are still there after the grace time."""
    for process in processes:
        _send(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=grace_seconds)
    for process in alive:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=grace_seconds)
    _reap()


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _reap() -> None:
    """Collect adopted children that have ended."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
