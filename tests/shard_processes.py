"""Shards in processes of their own, without Ray: what tests run tensor and pipeline parallelism on.

Processes are started once per test session, since importing torch takes seconds, and take one replica after another:

    shard_processes.executor(folder, tp=2, pp=2, num_blocks=64)  ─▶  Executor over ranks 0…3
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from raytroupe.actors.shard_config import ShardConfig
from raytroupe.cluster.errors import ShardFailed
from raytroupe.cluster.step import StepPlan, StepResult
from raytroupe.cluster.topology import all_layouts
from raytroupe.kernels.backend import CHOICE

START_SECONDS = 120.0
OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "timeout_seconds": 60.0}


class ProcessShards:
    """Up to as many shard processes as the largest replica asked for needs."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def launch(self, count: int) -> None:
        """Have `count` processes; they come up together."""
        while len(self._workers) < count:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), name="test-shard", daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))

    def executor(
        self, folder: Path, tp: int, pp: int, num_blocks: int, kernels: str = "", **options: Any
    ) -> ProcessExecutor:
        """A replica of `folder` on tp * pp processes, ready to run plans. Close it before asking for the next one.

        Args:
            kernels: value of `kernels/backend.py`'s environment variable.
            options: fields of `ShardConfig`; by default the shards compute in float32 with one thread.
        """
        self.launch(tp * pp)
        connections = [connection for _, connection in self._workers[: tp * pp]]
        rendezvous = f"tcp://127.0.0.1:{_free_port()}"
        for layout, connection in zip(all_layouts(tp, pp), connections, strict=True):
            config = ShardConfig(folder=folder, layout=layout, init_method=rendezvous, **{**OPTIONS, **options})
            connection.send(("open", (config, num_blocks, kernels)))
        executor = ProcessExecutor(connections)
        answers = [_receive(connection) for connection in connections]
        failures = [str(payload) for kind, payload in answers if kind != "ready"]
        if failures:
            executor.close()
            raise ShardFailed("\n".join(failures))
        return executor

    def close(self) -> None:
        """End all processes."""
        for _, connection in self._workers:
            with contextlib.suppress(OSError):
                connection.send(("exit", None))
        for process, connection in self._workers:
            process.join(10)
            if process.is_alive():
                process.terminate()
                process.join()
            connection.close()
        self._workers.clear()


class ProcessExecutor:
    """`Executor` over the pipes to the processes of one replica. Its methods are those of `actors/executor.py`."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections
        self._in_flight = 0
        self._results: collections.deque[StepResult] = collections.deque()
        self._failure: ShardFailed | None = None
        self._closed = False

    def submit(self, plan: StepPlan) -> None:
        if self._failure is not None:
            raise self._failure
        self._in_flight += 1
        for connection in self._connections:
            connection.send(("run", plan))

    async def result(self) -> StepResult:
        assert self._in_flight, "no plan is in flight"
        while not self._results:
            if self._failure is not None:
                raise self._failure
            await self._readable()
            for connection in self._connections:
                while self._failure is None and connection.poll():
                    self._take(*_receive(connection))
        self._in_flight -= 1
        return self._results.popleft()

    def close(self) -> None:
        """Wait for the plans in flight and leave the processes ready for the next replica."""
        if self._closed:
            return
        self._closed = True
        for connection in self._connections:
            connection.send(("close", None))
        for connection in self._connections:
            while _receive(connection)[0] not in ("closed", "gone"):
                pass

    def _take(self, kind: str, payload: Any) -> None:
        if kind == "result":
            self._results.append(payload)
        else:
            self._failure = ShardFailed(f"a test shard failed: {payload}")

    async def _readable(self) -> None:
        """Until any process has sent something."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        for connection in self._connections:
            loop.add_reader(connection.fileno(), ready.set)
        try:
            await ready.wait()
        finally:
            for connection in self._connections:
                loop.remove_reader(connection.fileno())


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        if not connection.poll(START_SECONDS):
            return "gone", f"no answer within {START_SECONDS:g} s"
        return connection.recv()
    except EOFError:
        return "gone", "the process ended"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(connection: Connection) -> None:
    """A process's life: replicas come and go."""
    from raytroupe.actors.shard import Shard

    shard: Shard | None = None
    while True:
        try:
            command, payload = connection.recv()
        except EOFError:
            return
        try:
            if command == "open":
                config, num_blocks, os.environ[CHOICE] = payload
                shard = Shard(config)
                shard.connect()
                shard.load()
                shard.allocate(num_blocks)
                connection.send(("ready", None))
            elif command == "run" and shard is not None:
                result = shard.run(payload)
                if result is not None:
                    connection.send(("result", result))
            elif command == "close":
                if shard is not None:
                    shard.close()
                    shard = None
                connection.send(("closed", None))
            elif command == "exit":
                return
        except Exception:
            connection.send(("failed", traceback.format_exc()))
            if shard is not None:
                shard.close()
                shard = None
