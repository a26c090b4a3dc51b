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


def shards_per_node(models: Sequence[ModelConfig], devices: Sequence[Device], device: Device, nodes: int) -> int:
    """Shards on the fullest node if they are spread evenly."""
    shards = sum(
        model.replicas * model.shards_per_replica
        for model, its_device in zip(models, devices, strict=True)
        if its_device == device
    )
    return -(-shards // nodes)


def _room(device: Device, models: Sequence[ModelConfig], capacity: Capacity) -> int:
    if device == "cuda":
        return int(capacity.gpus)
    schedulers = sum(model.replicas for model in models)
    return max(0, int((capacity.cpus - schedulers * SCHEDULER_CPUS) / CPU_SHARD_CPUS + 1e-9))


def _count(model: ModelConfig) -> str:
    tp, pp, replicas = model.tensor_parallel_size, model.pipeline_parallel_size, model.replicas
    return f"{model.name} (tensor {tp} × pipeline {pp} × replicas {replicas} = {tp * pp * replicas})"
