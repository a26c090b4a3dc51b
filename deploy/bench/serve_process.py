"""A `troupe serve` in a process of its own, for benchmarks that measure from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import httpx

from ...cluster.errors import EngineError
from ..local_machine import free_ports

TROUPE_SERVE = ("raytroupe.deploy.cli", "serve")
READY_SECONDS = 180.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.02


class ServeProcess:
    """Starts `troupe serve ARGUMENTS` on free ports; as a context manager it waits until the server is healthy.

    `program` is another module, with its first arguments, that serves the same API and takes the same two ports.
    `lines` are what the server printed, each with the seconds since the process was started; `healthy_after` is when
    the server was found healthy, in the same seconds.
    """

    def __init__(self, *arguments: str, program: Sequence[str] = TROUPE_SERVE) -> None:
        self.port, dashboard_port = free_ports(2)
        self.address = f"http://127.0.0.1:{self.port}"
        self.lines: list[tuple[float, str]] = []
        self.healthy_after = float("nan")
        ports = ["--port", str(self.port), "--dashboard-port", str(dashboard_port)]
        command = [sys.executable, "-m", *program, *arguments, *ports]
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> ServeProcess:
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_healthy(self) -> None:
        """Wait for `GET /health` to answer 200.

        Raises:
            EngineError: the process ended, or was not healthy in time; with the last lines that it printed.
        """
        deadline = self.started + READY_SECONDS
        with httpx.Client(timeout=5) as client:
            while time.perf_counter() < deadline:
                if self._process.poll() is not None:
                    raise EngineError(f"troupe serve ended with code {self._process.returncode}:\n{self._last_lines()}")
                try:
                    if client.get(f"{self.address}/health").status_code == 200:
                        self.healthy_after = time.perf_counter() - self.started
                        return
                except httpx.TransportError:
                    pass
                time.sleep(POLL_SECONDS)
        raise EngineError(f"troupe serve was not healthy after {READY_SECONDS:.0f} s:\n{self._last_lines()}")

    def model_names(self) -> list[str]:
        """The models that the server lists."""
        answer = httpx.get(f"{self.address}/v1/models", timeout=30).raise_for_status()
        return [model["id"] for model in answer.json()["data"]]

    def stop(self) -> None:
        """End the server as Ctrl-C does, and kill what is left of its process group if that takes too long."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._reader.join(timeout=5)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.perf_counter() - self.started, line.rstrip()))

    def _last_lines(self, count: int = 20) -> str:
        return "\n".join(line for _, line in self.lines[-count:])
