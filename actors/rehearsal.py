"""Compiles a GPU's kernels while the weights are still being read.

What Triton compiles depends on the shapes of a shard, not on its weights. So a small decoder of the same shapes, with
one layer of every kind and random weights, runs the steps of the warm-up; the shard's own find all kernels there.
"""

from __future__ import annotations

import dataclasses

import msgspec
import torch
from torch import Tensor

from ..cluster.model_spec import ModelSpec
from ..cluster.topology import ShardLayout
from ..kernels.gpu.triton_kernels import TritonKernels
from .collectives import SingleShard
from .decoder import Decoder
from .device import resolve_kv_dtype
from .device_runner import DeviceRunner
from .kv_cache import KVCache
from .out_of_memory import is_out_of_memory
from .runner import new_runner
from .shard_config import ShardConfig
from .weights import load_weights


class Rehearsal(SingleShard):
    """The collectives of a shard that has its share of every weight and no peers."""

    def __init__(self, layout: ShardLayout) -> None:
        self._layout = layout

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        return x.repeat(1, self._layout.tp_size)


def rehearsed_spec(spec: ModelSpec, layout: ShardLayout) -> ModelSpec:
    """A model with one layer of every kind that the shard has."""
    kinds = tuple(dict.fromkeys(spec.layers[index] for index in layout.layers(spec)))
    return msgspec.structs.replace(spec, layers=kinds, num_layers=len(kinds))


def rehearse(spec: ModelSpec, config: ShardConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Run every step of the warm-up on a small decoder of this shard's shapes. A device without room for that compiles
    when it warms up."""
    layout = dataclasses.replace(config.layout, pp_rank=0, pp_size=1)
    small = rehearsed_spec(spec, config.layout)
    try:
        weights = load_weights(config.folder, small, layout, dtype, device, load_format="dummy")
        kernels = TritonKernels(device, dtype)
        collectives = Rehearsal(layout)
        decoder = Decoder(small, layout, weights, kernels, collectives, config.max_model_len)
        kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, dtype, device)
        cache = KVCache(small, layout, 1, config.block_size, kv_dtype, device)
        runner = new_runner(decoder, cache, small, layout, collectives, kernels, config, device, dtype)
        assert isinstance(runner, DeviceRunner)
        runner.warm_up(record=False)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
