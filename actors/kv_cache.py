"""The memory behind a shard's KV blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..cluster.model_spec import ModelSpec
from ..cluster.topology import ShardLayout
from ..kernels import huge_pages
from ..kernels.quantised_kv import LIMITS


class LayerCache(NamedTuple):
    """Of one layer."""

    keys: Tensor
    """[kv_heads, num_blocks, block_size, head_dim], like `values`."""
    values: Tensor
    scales: tuple[Tensor, Tensor] | None
    """Of keys and of values, each [kv_heads, num_blocks, block_size] float32; None unless the cache is of 8 bits."""


class KVCache:
    """Keys and values of this shard's layers and heads, laid out as `kernels/paged_attention.py` describes.

    A block id means the same in every layer and on every shard of a replica. Memory starts as zeros, so that blocks
    that were never written are harmless to read. A CPU's is provided when it is first touched: half of a machine's
    memory takes longer to fill than a model to load, and most of it is not needed soon.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: ShardLayout,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`dtype` is what the decoder computes in, or one of `quantised_kv.LIMITS`."""
        shape = (len(layout.layers(spec)), 2, layout.num_kv_heads(spec), num_blocks, block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        cache = _zeros((*shape, spec.head_dim), dtype, device)
        scales = _zeros(shape, torch.float32, device) if dtype in LIMITS else None
        self._layers = [
            LayerCache(keys, values, None if scales is None else (scales[index, 0], scales[index, 1]))
            for index, (keys, values) in enumerate(cache)
        ]

    def layer(self, index: int) -> LayerCache:
        """This stage's `index`-th layer."""
        return self._layers[index]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return huge_pages.zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
