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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import msgspec
import ray

from ..cluster.kv_memory import DeviceMemory
from ..cluster.messages import Endpoint
from ..cluster.topology import ShardLayout, kv_bytes_per_block
from .channel import ShardServer
from .replica_settings import ReplicaSettings
from .reporter import Reporter
from .shard_config import ShardConfig

if TYPE_CHECKING:
    from .shard import Shard

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
SPIN_COUNT = 100_000
"""Turns of libgomp's waiting loop before a thread sleeps, where others want its core: tenths of a millisecond."""
SMALL_NODE_CORES = 4
"""On a node with so few, the scheduler, the ingress and the proxy compete with the shards as well."""


class ShardPlace(msgspec.Struct, frozen=True):
    """Where a shard's process runs."""

    node_id: str
    address: str
    """Of the node, in Ray's network."""


class ShardReport(msgspec.Struct, frozen=True):
    """What a shard says when it has loaded its weights."""

    memory: DeviceMemory
    dtype: str
    kv_block_bytes: int
    """Size of one KV block on this shard."""


class ShardActor:
    """One shard of one replica, in its own process."""

    def __init__(self, settings: ReplicaSettings, layout: ShardLayout, replica: str) -> None:
        os.environ.update(_omp_environment(settings.num_threads, settings.shards_per_node))
        self._settings = settings
        self._layout = layout
        self._thread = ThreadPoolExecutor(1, "shard")
        self._reporter = Reporter(settings.listener, settings.name, replica)
        self._shard: Shard | None = None
        self._listener: socket.socket | None = None
        self._place = ShardPlace(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())
        self._thread.submit(importlib.import_module, ".shard", __package__)  # torch loads while the group is formed

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

    async def load(self, rendezvous: str) -> ShardReport:
        """Meet the other shards at `rendezvous`, what rank 0's `listen` gave (empty without any), and load this one's
        weights.

        Raises:
            CheckpointError: the model folder cannot be loaded.
        """
        return await self._in_thread(lambda: self._load(rendezvous))

    async def allocate(self, num_blocks: int) -> None:
        """Allocate the KV cache."""
        assert self._shard is not None, "load first"
        shard = self._shard
        await self._in_thread(lambda: shard.allocate(num_blocks))

    async def serve(self, endpoint: Endpoint) -> None:
        """Connect to the scheduler and run its plans; ends when the scheduler says so.

        Raises:
            ShardFailed: a step raised.
        """
        assert self._shard is not None, "load first"
        shard = self._shard
        server = ShardServer(endpoint, self._layout.rank, self._place.address)
        await self._in_thread(lambda: server.serve(shard.run))

    def _load(self, rendezvous: str) -> ShardReport:
        from .shard import Shard

        settings = self._settings
        config = ShardConfig(
            folder=settings.folder,
            layout=self._layout,
            dtype=settings.dtype,
            device=settings.device,
            block_size=settings.block_size,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            num_threads=settings.num_threads,
            init_method=rendezvous,
            listen_fd=self._listener.detach() if self._listener is not None else None,
        )
        self._shard = Shard(config)
        self._shard.connect()
        self._shard.load(lambda done, total: self._reporter.progress(self._layout.rank, done, total))
        dtype = self._shard.dtype
        block_bytes = kv_bytes_per_block(self._shard.spec, self._layout, settings.block_size, dtype.itemsize)
        return ShardReport(self._shard.memory(), str(dtype).removeprefix("torch."), block_bytes)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _omp_environment(num_threads: int, shards_per_node: int) -> dict[str, str]:
    """What OpenMP reads when torch is imported, in a process whose node has `shards_per_node` shards.

    A thread of libgomp that waits for the others spins first, for milliseconds unless it knows that there are more
    threads than cores, which it can tell for its own process only. If another process needs the core meanwhile,
    the spinning takes it from the very thread that is waited for. Then the time spun is bounded; a shard alone on its
    node, where spinning is what makes small products fast, keeps libgomp's own.
    """
    # Ray sets the number of threads to 1 for an actor that asks for less than a CPU.
    environment = {"OMP_NUM_THREADS": str(num_threads)}
    shared = shards_per_node > 1 or len(os.sched_getaffinity(0)) <= SMALL_NODE_CORES
    if num_threads > 1 and shared and not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    return environment
