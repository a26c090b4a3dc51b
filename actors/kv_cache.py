"""The memory behind a shard's KV blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cluster.model_spec import ModelSpec
from ..cluster.topology import ShardLayout


class KVCache:
    """Keys and values of this shard's layers and heads, laid out as `kernels/paged_attention.py` describes.

    A block id means the same in every layer and on every shard of a replica. Memory starts as zeros, so that blocks
    that were never written are harmless to read.
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
        shape = (layout.num_kv_heads(spec), num_blocks, block_size, spec.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._layers = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in layout.layers(spec)
        ]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of this stage's `index`-th layer, each [kv_heads, num_blocks, block_size, head_dim]."""
        return self._layers[index]
