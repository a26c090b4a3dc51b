"""The runner that suits a shard's kernels."""

from __future__ import annotations

from typing import Protocol

import torch

from ..cluster.model_spec import ModelSpec
from ..cluster.step import StepPlan, StepResult
from ..cluster.topology import ShardLayout
from ..kernels.interface import Kernels
from .collectives import Collectives
from .decoder import Decoder
from .executor import Pending
from .kv_cache import KVCache
from .model_runner import ModelRunner
from .shard_config import ShardConfig


class Runner(Protocol):
    """Runs plans in order. Every shard of a replica gets the same plans; none may skip one."""

    def launch(self, plan: StepPlan) -> StepResult | Pending | None:
        """Start a step; None on every rank that is not `layout.is_output`."""

    def run(self, plan: StepPlan) -> StepResult | None:
        """Start a step and wait for it."""

    def warm_up(self) -> None:
        """Load and record all that a step needs; all shards of a replica do so together."""

    def profile(self) -> None:
        """Run the largest step there can be, likewise; a cache of one block suffices."""


def new_runner(
    decoder: Decoder,
    kv_cache: KVCache,
    spec: ModelSpec,
    layout: ShardLayout,
    collectives: Collectives,
    kernels: Kernels,
    config: ShardConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Runner:
    """A runner around a decoder and its cache; `kernels` are those of the decoder."""
    limits = {
        "block_size": config.block_size,
        "max_num_seqs": config.max_num_seqs,
        "max_model_len": config.max_model_len,
        "max_num_batched_tokens": config.max_num_batched_tokens,
    }
    if kernels.steps_on_device:
        from ..kernels.gpu.triton_kernels import TritonKernels
        from .device_runner import DeviceRunner  # a CPU does without Triton

        assert isinstance(kernels, TritonKernels)
        return DeviceRunner(decoder, kv_cache, spec, layout, collectives, kernels, **limits, device=device, dtype=dtype)
    return ModelRunner(decoder, kv_cache, spec, layout, collectives, **limits, device=device, dtype=dtype)
