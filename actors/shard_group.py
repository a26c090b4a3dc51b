"""The shard actors of one replica: created in its placement group, brought up together, watched for death.

```
place ─▶ load (rendezvous, weights) ─▶ report (memory) ─▶ allocate (KV cache) ─▶ serve (until the end)
```
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..cluster.cpu_topology import format_cpus
from ..cluster.errors import ShardFailed
from ..cluster.startup import PROCESS, slowest
from ..cluster.topology import all_layouts
from .channel import DEATH_SECONDS, ChannelExecutor
from .placement import shard_bundle
from .replica_settings import ReplicaSettings
from .shard_actor import LOOPBACK, ShardActor, ShardPlace, ShardReport

CONNECT_SECONDS = 30.0


class ShardGroup:
    """All shards of a replica. Any failure is final: the replica is replaced as a whole."""

    def __init__(self, settings: ReplicaSettings, replica: str, group: PlacementGroup) -> None:
        """Create the actors in bundles 1, 2, … of `group`; they start in the background."""
        self._began = time.perf_counter()
        self._process_seconds = 0.0
        self._places: list[ShardPlace] = []
        self._watches: list[asyncio.Task[None]] = []
        bundle = shard_bundle("cuda" if settings.device == "cuda" else "cpu")
        actor_class = ray.remote(ShardActor)
        self._actors: list[Any] = [
            actor_class.options(
                name=f"{settings.name}:{replica}:{layout.rank}",
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, layout.rank + 1),
            ).remote(settings, layout, replica)
            for layout in all_layouts(settings.tensor_parallel_size, settings.pipeline_parallel_size)
        ]

    async def load(self) -> list[ShardReport]:
        """Load all weights; what every shard reports, in rank order, after all have loaded.

        Raises:
            CheckpointError: the model folder cannot be loaded.
            ConfigError: the weights or a step do not fit a device.
            ShardFailed: a shard's process died.
        """
        self._places = await self._all(lambda actor: actor.place.remote())
        self._process_seconds = time.perf_counter() - self._began
        first = self._places[0]
        together = all(place.node_id == first.node_id for place in self._places)
        rendezvous = ""
        if len(self._actors) > 1:
            [rendezvous] = await self._all(
                lambda actor: actor.listen.remote(LOOPBACK if together else first.address), self._actors[:1]
            )
        await self._all(lambda actor: actor.load.remote(rendezvous))
        return await self._all(lambda actor: actor.report.remote())

    async def allocate(self, num_blocks: int) -> dict[str, float]:
        """Allocate the KV cache on every shard; the seconds of the start's phases, each on the slowest shard.

        Raises:
            ConfigError: the cache does not fit a device.
            ShardFailed: a shard's process died.
        """
        shards = await self._all(lambda actor: actor.allocate.remote(num_blocks))
        return slowest([{PROCESS: self._process_seconds}, *shards])

    async def serve(self, on_death: Callable[[ShardFailed], None]) -> ChannelExecutor:
        """Connect all shards to a new executor. `on_death` is called, after the executor has failed, at most once."""
        here = ray.get_runtime_context().get_node_id()
        local = all(place.node_id == here for place in self._places)
        executor = ChannelExecutor(LOOPBACK if local else ray.util.get_node_ip_address(), len(self._actors))
        reported = False

        async def watch(rank: int, call: Any) -> None:
            nonlocal reported
            try:
                await call
                return
            except RayError as error:
                cause = self._explain(rank, error)
                failure = cause if isinstance(cause, ShardFailed) else ShardFailed(f"shard {rank} failed: {cause}")
                if isinstance(error, RayTaskError):
                    await asyncio.sleep(DEATH_SECONDS)  # as the channel does; a death would be the cause
            executor.fail(failure)
            if not reported:
                reported = True
                on_death(failure)

        for rank, actor in enumerate(self._actors):
            self._watches.append(asyncio.create_task(watch(rank, actor.serve.remote(executor.endpoint))))
        await executor.connected(CONNECT_SECONDS)
        return executor

    def kill(self) -> None:
        """End all shards at once."""
        for watch in self._watches:
            watch.cancel()
        for actor in self._actors:
            ray.kill(actor)

    async def _all(self, call: Callable[[Any], Any], actors: Sequence[Any] | None = None) -> list[Any]:
        """Call every shard, or `actors`; the first failure ends the wait, because the others may wait for that one."""

        async def one(rank: int, actor: Any) -> Any:
            try:
                return await call(actor)
            except RayError as error:
                raise self._explain(rank, error) from None

        return list(await asyncio.gather(*(one(rank, actor) for rank, actor in enumerate(actors or self._actors))))

    def _explain(self, rank: int, error: RayError) -> Exception:
        """What a user should read: a shard's own exception, or that its process is gone."""
        if isinstance(error, RayTaskError):
            return error.cause if isinstance(error.cause, Exception) else error
        where = f" on node {self._places[rank].address}" if self._places else ""
        return ShardFailed(f"the process of shard {rank}{where} ended unexpectedly: {cause_of_death(error)}")


def describe_cpus(choices: Sequence[str | None]) -> list[str]:
    """What shards say of their CPUs, in rank order, as lines: one for all of which the same is true."""
    ranks: dict[str, list[int]] = {}
    for rank, choice in enumerate(choices):
        if choice is not None:
            ranks.setdefault(choice, []).append(rank)
    return [f"shard{'s' if len(group) > 1 else ''} {format_cpus(group)}: {choice}" for choice, group in ranks.items()]


def cause_of_death(error: RayError) -> str:
    """What Ray knows about the end of a process, in one line."""
    lines = str(error).splitlines()
    # The first line says that the actor died; the indented ones say which.
    causes = [line.strip() for line in lines[1:] if line.strip() and not line.startswith("\t")] or lines[:1]
    if not causes:
        return "no cause given"
    detail = causes[0].rpartition("Worker exit detail: ")[2]
    return detail.partition(" Some common causes include: ")[0].rstrip(".")
