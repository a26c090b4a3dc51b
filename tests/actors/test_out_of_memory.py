"""A full GPU: every stage names the settings that help, with their values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytroupe.actors.out_of_memory import Stage, is_out_of_memory, out_of_memory_named
from raytroupe.actors.shard_config import ShardConfig
from raytroupe.cluster.errors import ConfigError, EngineError
from raytroupe.cluster.topology import ShardLayout

CONFIG = ShardConfig(
    folder=Path("model"), layout=ShardLayout(tp_size=2), dtype="float32", max_num_seqs=33, max_num_batched_tokens=4096
)
TORCH = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB is "
    "free. Process 7 has 77.61 GiB memory in use. Of the allocated memory 70.00 GiB is allocated by PyTorch, and "
    "2.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF."
)


@pytest.mark.parametrize(
    ("stage", "kind", "settings"),
    [
        (Stage.WEIGHTS, ConfigError, ["loading the weights", "tensor_parallel_size (2)", "dtype (float32)"]),
        (Stage.PROFILE, ConfigError, ["largest step", "max_num_batched_tokens (4096)", "max_num_seqs (33)"]),
        (Stage.CACHE, ConfigError, ["KV cache", "gpu_memory_utilization", "kv_cache_memory"]),
        (Stage.STEP, EngineError, ["running a step", "lower gpu_memory_utilization"]),
    ],
)
def test_every_stage_names_what_to_change(stage: Stage, kind: type, settings: list[str]) -> None:
    with pytest.raises(kind) as caught, out_of_memory_named(stage, CONFIG):
        raise torch.OutOfMemoryError(TORCH)
    message = str(caught.value)
    for setting in settings:
        assert setting in message
    assert message.endswith(
        "(Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB is free)"
    )
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "Triton Error [CUDA]: out of memory",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: NCCLUtils.cpp:94, ncclUnhandledCudaError\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_what_libraries_say_is_recognised(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    with pytest.raises(ConfigError) as caught, out_of_memory_named(Stage.CACHE, CONFIG):
        raise RuntimeError(text)
    assert str(caught.value).endswith(f"({text.splitlines()[0]})")


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, out_of_memory_named(Stage.STEP, CONFIG):
        raise error
    assert caught.value is error


def test_the_cause_is_kept() -> None:
    cause = torch.OutOfMemoryError(TORCH)
    with pytest.raises(EngineError) as caught, out_of_memory_named(Stage.STEP, CONFIG):
        raise cause
    assert caught.value.__cause__ is cause
