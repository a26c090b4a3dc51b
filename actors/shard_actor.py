"""The Ray shell around one shard.

All that blocks (importing torch, loading, allocating, the step loop) happens in one thread, which owns the model; the
actor's event loop stays free. Steps do not come through actor calls: `serve` is one call that lasts as long as the
replica, and whoever waits for it learns at once when this process dies.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import msgspec
import ray

from ..cluster.cpu_affinity import CpuClaims, keep_off_shards, pin_thread, plan_this_node
from ..cluster.kv_memory import DeviceMemory
from ..cluster.messages import Endpoint
from ..cluster.startup import IMPORTS, StartupClock
from ..cluster.topology import ShardLayout
from . import openmp
from .channel import ShardServer
from .replica_settings import ReplicaSettings
from .reporter import Reporter

if TYPE_CHECKING:
    from .shard import Shard

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
CLAIM_SECONDS = 1.0
"""For the shards of a replica that has just been given up to end and leave their CPUs."""


class ShardPlace(msgspec.Struct, frozen=True):
    """Where a shard's process runs."""

    node_id: str
    address: str
    """Of the node, in Ray's network."""


class ShardReport(msgspec.Struct, frozen=True):
    """What a shard says when all have loaded their weights."""

    memory: DeviceMemory
    dtype: str
    kv_block_bytes: int
    """Size of one KV block on this shard."""
    cpus: str | None
    """Which CPUs it computes on and why, in one sentence; None on a GPU."""


class ShardActor:
    """One shard of one replica, in its own process."""

    def __init__(self, settings: ReplicaSettings, layout: ShardLayout, replica: str) -> None:
        self._settings = settings
        self._layout = layout
        self._claims = CpuClaims()
        self._clock = StartupClock()
        self._plan = plan_this_node(shards=settings.shards_per_node, num_threads=settings.num_threads)
        os.environ.update(openmp.environment(self._plan))
        self._cpus = self._take_cpus() if settings.device == "cpu" else None
        self._thread = ThreadPoolExecutor(1, "shard", initializer=lambda: pin_thread(self._cpus or self._plan.usable))
        self._reporter = Reporter(settings.listener, settings.name, replica)
        self._shard: Shard | None = None
        self._listener: socket.socket | None = None
        self._place = ShardPlace(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())
        self._thread.submit(self._import_torch)  # while the group is formed

    def __repr__(self) -> str:
        return f"Shard({self._settings.name}, rank {self._layout.rank})"

    async def place(self) -> ShardPlace:
        """Where this process runs."""
        return self._place

    async def listen(self, host: str) -> str:
        """Open the rendezvous of all shards on `host`, an address of this node; to be asked of rank 0. Its address for
        torch.distributed."""

        def open_socket() -> str:
            from .collectives import rendezvous_socket  # in the thread, because torch comes with it

            self._listener = rendezvous_socket(host)
            port = self._listener.getsockname()[1]
            return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

        return await self._in_thread(open_socket)

    async def load(self, rendezvous: str) -> None:
        """Meet the other shards at `rendezvous`, what rank 0's `listen` gave (empty without any), and load this one's
        weights.

        Raises:
            CheckpointError: the model folder cannot be loaded.
        """
        await self._in_thread(lambda: self._load(rendezvous))

    async def report(self) -> ShardReport:
        """What this shard has and needs; to be asked of all shards together, when all have loaded.

        Raises:
            ConfigError: a step does not fit the device.
        """
        return await self._in_thread(self._report)

    async def allocate(self, num_blocks: int) -> dict[str, float]:
        """Allocate the KV cache; the seconds of every phase of the start (`cluster/startup.py`).

        Raises:
            ConfigError: the cache does not fit the device.
        """
        assert self._shard is not None, "load first"
        shard = self._shard
        await self._in_thread(lambda: shard.allocate(num_blocks))
        return self._clock.seconds

    async def serve(self, endpoint: Endpoint) -> None:
        """Connect to the scheduler and run its plans; ends when the scheduler says so.

        Raises:
            ShardFailed: a step raised.
        """
        assert self._shard is not None, "load first"
        shard = self._shard
        server = ShardServer(endpoint, self._layout.rank, self._place.address)
        await self._in_thread(lambda: server.serve(shard.launch))

    def _import_torch(self) -> None:
        with self._clock.phase(IMPORTS):
            importlib.import_module(".shard", __package__)

    def _load(self, rendezvous: str) -> None:
        from .shard import Shard

        listen_fd = self._listener.detach() if self._listener is not None else None
        config = self._settings.shard_config(
            self._layout, self._plan.threads, init_method=rendezvous, listen_fd=listen_fd
        )
        self._shard = Shard(config, self._clock)
        self._shard.connect()
        self._shard.load(lambda done, total: self._reporter.progress(self._layout.rank, done, total))

    def _report(self) -> ShardReport:
        assert self._shard is not None, "load first"
        shard, settings = self._shard, self._settings
        block_bytes = settings.kv_bytes_per_block(shard.spec, self._layout, shard.dtype.itemsize)
        cpus = self._plan.explain(self._cpus) if settings.device == "cpu" else None
        return ShardReport(shard.memory(), str(shard.dtype).removeprefix("torch."), block_bytes, cpus)

    def _take_cpus(self) -> tuple[int, ...] | None:
        """CPUs for the thread that owns the model and for those that it starts; Ray's threads go elsewhere."""
        deadline = time.monotonic() + CLAIM_SECONDS
        while (taken := self._claims.take(self._plan.choices)) is None and self._plan.choices:
            if time.monotonic() > deadline:
                return None
            time.sleep(CLAIM_SECONDS / 10)
        if taken is not None:
            keep_off_shards(self._plan)
        return taken

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)
