"""A Ray cluster on this machine that lives as long as the command that started it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType

import psutil

from ..actors.placement import Capacity
from ..cluster.errors import EngineError
from .local_machine import DASHBOARD_HOST, free_ports
from .supervisor import end_processes

_OBJECT_STORE_BYTES = 128 * 2**20
"""Nothing large goes through Ray's object store; its default would reserve 30 % of the memory."""
_LONGEST_STREAM_SECONDS = 3600
_DASHBOARD_SECONDS = 60.0
"""For the dashboard to listen, from the moment in which models are served."""
_BACKGROUND_NICENESS = 10
"""Added to that of processes that only watch: the engine's work goes first, and so does the rest of the start."""
_LOOK_SECONDS = 0.05
_BACKGROUND = ("dashboard/dashboard.py", "log_monitor.py", "autoscaler/_private/monitor.py")


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
        self._ray: ModuleType | None = None
        self._vital: list[psutil.Process] = []
        self.log = self.folder / "driver.log"
        self.address = ""
        """Of Ray's control store, for other drivers (`RAY_ADDRESS`)."""
        self.dashboard_url = f"http://{DASHBOARD_HOST}:{dashboard_port}"

    def start(self) -> None:
        """Start Ray's processes; returns when this process is connected to them. The dashboard may take longer, see
        `await_dashboard`."""
        os.environ.update(self._environment())
        import ray

        self._ray = ray
        # The libraries that come next are imported while Ray's processes start.
        threading.Thread(target=importlib.import_module, args=("ray.serve",), daemon=True).start()
        started = threading.Event()
        threading.Thread(target=_calm_background, args=(started,), daemon=True).start()
        ray.init(
            address="local",
            num_cpus=int(self._capacity.cpus),
            num_gpus=int(self._capacity.gpus),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=None,  # True would make it an error not to wait for it
            dashboard_host=DASHBOARD_HOST,
            dashboard_port=self._dashboard_port,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            _temp_dir=str(self.folder / "ray"),
        )
        started.set()
        self._vital = [child for child in psutil.Process().children() if child.name() in ("gcs_server", "raylet")]
        self.address = ray.get_runtime_context().gcs_address

    def await_dashboard(self) -> None:
        """Wait until the dashboard listens.

        Raises:
            EngineError: it does not.
        """
        deadline = time.monotonic() + _DASHBOARD_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((DASHBOARD_HOST, self._dashboard_port), 1.0):
                return
            time.sleep(0.05)
        raise EngineError(f"Ray's dashboard did not start within {_DASHBOARD_SECONDS:.0f} s")

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
        # Asked before, because children of what has ended are nobody's descendants any more.
        family = psutil.Process().children(recursive=True)
        if self._ray is not None:
            self._ray.shutdown()
        end_processes(family)
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
            # A proxy whose configuration has changed is replaced, and ends when its last stream has, but no later than
            # this; the default would cut off generations longer than two minutes.
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_LONGEST_STREAM_SECONDS),
            "RAY_SERVE_HAPROXY_METRICS_PORT": metrics_port,
            "RAY_SERVE_HAPROXY_STATS_PORT": stats_port,
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": fallback_http,
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": fallback_grpc,
            # Our replicas never block their event loop, so Serve's own work can share it: 15 % more tokens a second
            # with 64 streams than with a thread and a loop for each.
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
            "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
            # How often each replica hands its counts to Ray. Serve's 100 ms are much work for figures that are
            # collected every few seconds.
            "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
            "RAY_SERVE_LOG_TO_STDERR": "0",
            # What guards our own sockets travels through Ray, so Ray must not be open to everybody.
            "RAY_AUTH_MODE": "token",
            # Ray would wait for its dashboard before it starts anything else, a third of the time to the first token.
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "0",
            # Ray would run our processes at niceness 15, behind everything else: its own dashboard, a client.
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


def _calm_background(started: threading.Event) -> None:
    """Let those children of this process that only watch give way to all others, as soon as each is there."""
    this = psutil.Process()
    seen: set[int] = set()
    last = False
    while not last:
        last = started.wait(_LOOK_SECONDS)
        for child in this.children():
            if child.pid in seen:
                continue
            with contextlib.suppress(psutil.Error):
                command = child.cmdline()
                if command == this.cmdline():
                    continue  # forked, and not yet the program that it will be
                seen.add(child.pid)
                if any(part.endswith(_BACKGROUND) for part in command):
                    child.nice(min(19, this.nice() + _BACKGROUND_NICENESS))
