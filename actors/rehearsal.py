"""Compiles a GPU's kernels while the weights are still being read.

What Triton compiles depends on the shapes of a shard, not on its weights. So a small decoder of the same shapes, with
one layer of every kind and random weights, runs the steps of the warm-up; the shard's own find all kernels there.
"""

from __future__ import annotations

import dataclasses

import msgspec
import torch
from torch import Tensor

from ..cluster.layer_spec import LayerSpec
from ..cluster.model_spec import ModelSpec
from ..cluster.quantisation import Quantisation, Rule, Scheme
from ..cluster.topology import ShardLayout, layer_matrices
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
    kinds: dict[tuple[LayerSpec, tuple[Scheme | None, ...]], int] = {}
    for index in layout.layers(spec):
        schemes = tuple(matrix.scheme(spec) for matrix in layer_matrices(spec, layout, index))
        kinds.setdefault((spec.layers[index], schemes), index)
    small = msgspec.structs.replace(spec, layers=tuple(layer for layer, _ in kinds), num_layers=len(kinds))
    if spec.quantisation is None:
        return small
    # Which module is quantised depends on its name, and so on the number of its layer.
    rules = [
        Rule(matrix.module, scheme)
        for number, (_, schemes) in enumerate(kinds)
        for matrix, scheme in zip(layer_matrices(small, layout, number), schemes, strict=True)
        if matrix.module is not None
    ]
    head = spec.naming.heads[0].removesuffix(".weight")
    rules.append(Rule(head, spec.quantisation.scheme(head)))
    return msgspec.structs.replace(small, quantisation=Quantisation(spec.quantisation.method, tuple(rules)))


def rehearse(spec: ModelSpec, config: ShardConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Run every step of the warm-up on a small decoder of this shard's shapes. A device without room for that compiles
    when it warms up."""
    layout = dataclasses.replace(config.layout, pp_rank=0, pp_size=1)
    small = rehearsed_spec(spec, config.layout)
    try:
        weights = load_weights(config.folder, small, layout, dtype, device, load_format="dummy")
        kernels = TritonKernels(device, dtype)
        collectives = Rehearsal(layout)
        decoder = Decoder(small, layout, weights, kernels, collectives, config.max_model_len, dtype, device)
        kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, dtype, device)
        cache = KVCache(small, layout, 1, config.block_size, kv_dtype, device)
        runner = new_runner(decoder, cache, small, layout, collectives, kernels, config, device, dtype)
        assert isinstance(runner, DeviceRunner)
        runner.warm_up(record=False)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
