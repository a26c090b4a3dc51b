"""What an application asks of the cluster: bundles of logical resources, and whether they fit.

A replica is one placement group: bundle 0 holds the scheduler (and the Serve replica around it), bundle 1 + r the
shard of rank r. On GPUs a shard owns one device. On CPUs shards share the cores, so they ask for a fraction only:
a machine with two cores can hold -tp 2 -pp 2, to try it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from ..cluster.config import ModelConfig
from ..cluster.errors import ConfigError

Device = Literal["cpu", "cuda"]

SCHEDULER_CPUS = 0.05
CPU_SHARD_CPUS = 0.2
GPU_SHARD_CPUS = 0.05
"""Logical CPUs. They limit how much is placed on a node, not how much a process computes."""


class Capacity(msgspec.Struct, frozen=True):
    """Logical resources of a cluster."""

    cpus: float
    gpus: float
    nodes: int = 1


def resolve_device(model: ModelConfig, capacity: Capacity) -> Device:
    """The device of a model's shards: `auto` means GPUs where the cluster has any."""
    if model.device == "auto":
        return "cuda" if capacity.gpus >= 1 else "cpu"
    return model.device


def shard_bundle(device: Device) -> dict[str, float]:
    """What one shard asks for."""
    return {"GPU": 1.0, "CPU": GPU_SHARD_CPUS} if device == "cuda" else {"CPU": CPU_SHARD_CPUS}


def replica_bundles(model: ModelConfig, device: Device) -> list[dict[str, float]]:
    """The placement group of one replica."""
    return [{"CPU": SCHEDULER_CPUS}, *(shard_bundle(device) for _ in range(model.shards_per_replica))]


def check_capacity(models: Sequence[ModelConfig], devices: Sequence[Device], capacity: Capacity) -> None:
    """Refuse an application that is larger than the cluster.

    Raises:
        ConfigError: with what every model asks for, and what there is.
    """
    totals: list[tuple[Device, str, float]] = [("cuda", "GPU", capacity.gpus), ("cpu", "CPU", capacity.cpus)]
    for device, resource, available in totals:
        bundles = [
            bundle
            for model, its_device in zip(models, devices, strict=True)
            for bundle in model.replicas * replica_bundles(model, its_device)
        ]
        wanted = sum(bundle.get(resource, 0.0) for bundle in bundles)
        on_device = [model for model, its_device in zip(models, devices, strict=True) if its_device == device]
        if wanted <= available + 1e-9 or not on_device:
            continue
        shards = sum(model.replicas * model.shards_per_replica for model in on_device)
        raise ConfigError(
            f"{' and '.join(_count(model) for model in on_device)} need {shards} {device} shards, and the cluster "
            f"has room for {_room(device, on_device, capacity)} ({available:g} logical {resource}s on "
            f"{capacity.nodes} node(s)); lower --tensor-parallel-size, --pipeline-parallel-size or --replicas, or add "
            "nodes"
        )


def most_replicas(models: Sequence[ModelConfig], devices: Sequence[Device], capacity: Capacity) -> list[int]:
    """Replicas that each model can have: its `max_replicas`, or fewer if the cluster has no room for so many beside
    what all models start with."""
    bundles = [replica_bundles(model, device) for model, device in zip(models, devices, strict=True)]
    room = {"CPU": capacity.cpus, "GPU": capacity.gpus}
    for resource in room:
        room[resource] -= sum(
            model.replicas * bundle.get(resource, 0.0)
            for model, its_bundles in zip(models, bundles, strict=True)
            for bundle in its_bundles
        )
    most = []
    for model, its_bundles in zip(models, bundles, strict=True):
        more = (model.replica_bounds or (0, model.replicas))[1] - model.replicas
        for resource, left in room.items():
            one = sum(bundle.get(resource, 0.0) for bundle in its_bundles)
            if one:
                more = min(more, max(0, int(left / one + 1e-9)))
        most.append(model.replicas + more)
    return most


def scaling_notices(models: Sequence[ModelConfig], devices: Sequence[Device], capacity: Capacity) -> list[str]:
    """One line for each model that cannot grow to its `max_replicas`. No reason to refuse: nodes may come later."""
    return [
        f"{model.name}: the cluster has room for {most} of max_replicas = {model.max_replicas}; "
        "further replicas wait for nodes"
        for model, most in zip(models, most_replicas(models, devices, capacity), strict=True)
        if model.max_replicas is not None and most < model.max_replicas
    ]


def shards_per_node(
    models: Sequence[ModelConfig], devices: Sequence[Device], device: Device, capacity: Capacity
) -> int:
    """Shards on the fullest node if they are spread evenly and each model has as many replicas as it can have: what a
    replica takes at its start must leave the others their share."""
    on_device = [
        (model, most)
        for model, its_device, most in zip(models, devices, most_replicas(models, devices, capacity), strict=True)
        if its_device == device
    ]
    at_start = sum(model.replicas * model.shards_per_replica for model, _ in on_device)
    at_most = sum(most * model.shards_per_replica for model, most in on_device)
    room = _room(device, [model for model, _ in on_device], capacity)  # each could grow, but not all of them
    return -(-max(at_start, min(at_most, room)) // capacity.nodes)


def _room(device: Device, models: Sequence[ModelConfig], capacity: Capacity) -> int:
    if device == "cuda":
        return int(capacity.gpus)
    schedulers = sum(model.replicas for model in models)
    return max(0, int((capacity.cpus - schedulers * SCHEDULER_CPUS) / CPU_SHARD_CPUS + 1e-9))


def _count(model: ModelConfig) -> str:
    tp, pp, replicas = model.tensor_parallel_size, model.pipeline_parallel_size, model.replicas
    return f"{model.name} (tensor {tp} × pipeline {pp} × replicas {replicas} = {tp * pp * replicas})"
