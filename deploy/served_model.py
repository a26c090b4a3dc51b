"""From a user's configuration to what every replica and ingress is told; refuses what cannot work before anything
starts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from ..actors.placement import Capacity, Device, check_capacity, resolve_device, shards_per_node
from ..actors.replica_settings import ReplicaSettings
from ..cluster.config import ModelConfig
from ..cluster.errors import CheckpointError, ConfigError
from ..cluster.evaluation_report import REPORT_FILE, read_report
from ..cluster.kv_memory import DeviceMemory
from ..cluster.messages import ModelCard
from ..cluster.model_spec import ModelSpec, load_generation_defaults, load_spec
from ..cluster.price import estimated_prices
from ..cluster.topology import ShardLayout, all_layouts, check_topology, weight_bytes
from .evaluation_gate import check_evaluated
from .model_folder import find_model_folder
from .weight_files import check_weight_files


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """One model of the application, with everything decided."""

    config: ModelConfig
    device: Device
    settings: ReplicaSettings
    card: ModelCard


def resolve_models(models: Sequence[ModelConfig], capacity: Capacity) -> list[ServedModel]:
    """Find every model's folder, read its config and decide what the user left open.

    Raises:
        ConfigError: a division that does not come out even, an application larger than the cluster, a context longer
            than the model's, a KV cache that cannot hold one request, a variant that was not evaluated.
        CheckpointError: a folder, its config or a file of weights is missing or unusable.
    """
    folders = [find_model_folder(model.model) for model in models]
    specs = [load_spec(folder) for folder in folders]
    for model, folder in zip(models, folders, strict=True):
        if model.load_format != "dummy":
            check_weight_files(folder)
    for model, spec in zip(models, specs, strict=True):
        check_topology(spec, model.tensor_parallel_size, model.pipeline_parallel_size)
    devices = [resolve_device(model, capacity) for model in models]
    check_capacity(models, devices, capacity)
    for model, folder, spec, device in zip(models, folders, specs, devices, strict=True):
        check_evaluated(model, spec, folder, device)  # last, as it may have to read all weights

    served = []
    for model, folder, spec, device in zip(models, folders, specs, devices, strict=True):
        sharing = shards_per_node(models, devices, device, capacity)
        settings = ReplicaSettings.of(
            model, folder=folder, device=device, max_model_len=_max_model_len(model, spec), shards_per_node=sharing
        )
        defaults = load_generation_defaults(folder)
        dtype_bytes = _dtype_bytes(model, spec)
        card = ModelCard(
            name=model.name,
            path=str(folder),
            max_model_len=settings.max_model_len,
            vocab_size=spec.vocab_size,
            eos_token_ids=spec.eos_token_ids,
            default_sampling={key: value for key, value in defaults.items() if key != "eos_token_id"},
            created=int(time.time()),
            block_size=settings.block_size,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_waiting=settings.max_num_waiting,
            price_per_hour=model.price_per_hour,
            estimated_prices=estimated_prices(spec, dtype_bytes, settings.max_num_seqs),
            weight_bytes=weight_bytes(spec, ShardLayout(), dtype_bytes),
            **_measured_quality(model, folder),
        )
        _check_kv_memory(settings, spec, dtype_bytes)
        served.append(ServedModel(model, device, settings, card))
    return served


def _measured_quality(model: ModelConfig, folder: Path) -> dict[str, Any]:
    """What the evaluation report beside the weights says of the model's answers, if there is one."""
    try:
        report = read_report(folder / REPORT_FILE)
    except CheckpointError:
        return {}  # whether it may be served all the same has been decided (`deploy/evaluation_gate.py`)
    evaluation = report.evaluations.get(model.kv_cache_dtype) if report is not None else None
    if evaluation is None:
        return {}
    tasks = {name: figures.accuracy for name, figures in evaluation.tasks.items()}
    return {"accuracy": evaluation.total.accuracy, "task_accuracy": tasks}


def _dtype_bytes(model: ModelConfig, spec: ModelSpec) -> int:
    """Bytes of a weight. For `auto` the checkpoint's: a device may need more, which only its shard can tell."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}[spec.dtype if model.dtype == "auto" else model.dtype]


def _max_model_len(model: ModelConfig, spec: ModelSpec) -> int:
    if model.max_model_len is None:
        return spec.max_position_embeddings
    if model.max_model_len > spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len = {model.max_model_len} exceeds the context of {model.name} "
            f"({spec.max_position_embeddings} tokens)"
        )
    return model.max_model_len


def _check_kv_memory(settings: ReplicaSettings, spec: ModelSpec, dtype_bytes: int) -> None:
    """Find out now what cannot fit: with this machine's memory for CPU shards, as if nothing else were started.

    A GPU's memory is known to its shards only; there the configured size, if any, is compared with one request.
    """
    layouts = all_layouts(settings.tensor_parallel_size, settings.pipeline_parallel_size)
    on_cpu = settings.device == "cpu"
    heaviest = max(weight_bytes(spec, layout, dtype_bytes, expands_floats=on_cpu) for layout in layouts)
    if on_cpu:
        memory = psutil.virtual_memory()
        free = max(0, memory.available - heaviest * settings.shards_per_node)
        device = DeviceMemory("cpu", memory.total, free, heaviest)
    elif settings.kv_cache_memory is not None:
        device = DeviceMemory("cuda", settings.kv_cache_memory, settings.kv_cache_memory, heaviest)
    else:
        return
    settings.plan_kv_memory([device], max(settings.kv_bytes_per_block(spec, layout, dtype_bytes) for layout in layouts))
