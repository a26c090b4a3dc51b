"""The memory behind a shard's KV blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cluster.model_spec import ModelSpec
from ..cluster.topology import ShardLayout
from ..kernels import huge_pages


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
        shape = (len(layout.layers(spec)), 2, layout.num_kv_heads(spec), num_blocks, block_size, spec.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        cache = (
            huge_pages.zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        )
        self._layers = [(keys, values) for keys, values in cache]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of this stage's `index`-th layer, each [kv_heads, num_blocks, block_size, head_dim]."""
        return self._layers[index]
