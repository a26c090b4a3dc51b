"""What a user can do when a GPU's memory is full, by what was being done."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator

import torch

from ..cluster.errors import ConfigError, EngineError, TroupeError
from .shard_config import ShardConfig


class Stage(enum.Enum):
    """What a shard is doing."""

    WEIGHTS = "loading the weights"
    PROFILE = "measuring the largest step"
    CACHE = "allocating the KV cache"
    STEP = "running a step"


_SAID_BY_LIBRARIES = (
    "out of memory",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_alloc_failed",
)
"""In the RuntimeErrors of Triton, NCCL and CUDA's libraries, in lower case."""


@contextlib.contextmanager
def out_of_memory_named(stage: Stage, config: ShardConfig) -> Iterator[None]:
    """Turn an error that says that the GPU's memory is full into one that says which setting to change.

    Raises:
        ConfigError: while starting. EngineError: in a step.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise explained(error, stage, config) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory was full: torch's own exception or that of a library."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(sign in str(error).lower() for sign in _SAID_BY_LIBRARIES)


def explained(error: RuntimeError, stage: Stage, config: ShardConfig) -> TroupeError:
    """The error for the user."""
    match stage:
        case Stage.WEIGHTS:
            remedy = (
                f"raise tensor_parallel_size ({config.layout.tp_size}) or choose a smaller dtype ({config.dtype}); "
                "other processes on the GPU count as well"
            )
        case Stage.PROFILE:
            remedy = (
                f"lower max_num_batched_tokens ({config.max_num_batched_tokens}) or max_num_seqs "
                f"({config.max_num_seqs}), or raise tensor_parallel_size ({config.layout.tp_size})"
            )
        case Stage.CACHE:
            remedy = "lower gpu_memory_utilization, or kv_cache_memory where it is set"
        case Stage.STEP:
            remedy = "lower gpu_memory_utilization, or kv_cache_memory where it is set, so that more stays free"
    message = f"the GPU's memory is full while {stage.value}: {remedy} ({_figures(error)})"
    return EngineError(message) if stage is Stage.STEP else ConfigError(message)


def _figures(error: RuntimeError) -> str:
    """What torch says first: how much was asked for, and how much there is. Its advice about allocators is left out."""
    sentences = str(error).partition("\n")[0].split(". ")
    wanted = [part for part in sentences if part.startswith("Tried to allocate") or "total capacity" in part]
    return ". ".join(wanted or sentences[:1]).rstrip(".")
