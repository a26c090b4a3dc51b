"""What the torch attention works out once per step for all layers: which rows go together, which blocks to gather.

Decode rows have one query each. Rows of similar length share one batched product; a long row among short ones would
pad them all, so lengths are cut into buckets:

    contexts (in blocks)  [ 9 10 9 8 | 64 ]   →   bucket of 4 rows padded to 10 blocks, bucket of 1 row with 64

Prefill rows are computed one by one. A sliding window moves the first block that is gathered.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .attention_metadata import AttentionMetadata

MAX_BUCKET_TOKENS = 16384
"""Gathered keys of a bucket, padding included: bounds the workspace."""
MAX_BUCKET_PADDING = 1024
"""Padded keys that a bucket may hold before a second one is cheaper."""


@dataclasses.dataclass(slots=True)
class DecodeBucket:
    """r rows with one query each, padded to n blocks."""

    rows: Tensor | slice
    """Which of the step's rows, as an index into the T query tokens."""
    count: int
    blocks: Tensor
    """[r * n] int64: block ids."""
    mask: Tensor
    """[1, r, 1, n * block size] float32 to be added to the scores: 0 or -inf."""


@dataclasses.dataclass(slots=True)
class PrefillRow:
    """One row with many queries."""

    tokens: slice
    """Its query tokens."""
    blocks: Tensor
    """[n] int64: block ids, from the first that any query sees."""
    num_keys: int
    """Keys in those blocks, without the tail of the last one."""
    mask: Tensor | None
    """[queries, num_keys] bool, True where visible; None: causal from the first key on."""


@dataclasses.dataclass(slots=True)
class AttentionPlan:
    """A step's rows, arranged for one window size at a time."""

    metadata: AttentionMetadata
    block_size: int
    _by_window: dict[int | None, tuple[list[DecodeBucket], list[PrefillRow]]] = dataclasses.field(default_factory=dict)

    def arrange(self, window: int | None) -> tuple[list[DecodeBucket], list[PrefillRow]]:
        """Buckets and rows for layers with this window; worked out at the first of them."""
        if window not in self._by_window:
            self._by_window[window] = (self._buckets(window), self._prefill_rows(window))
        return self._by_window[window]

    def _buckets(self, window: int | None) -> list[DecodeBucket]:
        metadata, size = self.metadata, self.block_size
        contexts = metadata.contexts[: metadata.decode_rows]
        firsts = [max(0, context - window) // size if window else 0 for context in contexts]
        lengths = [-(-context // size) - first for context, first in zip(contexts, firsts, strict=True)]
        return [
            self._bucket(rows, [firsts[row] for row in rows], max(lengths[row] for row in rows), window)
            for rows in cut_into_buckets(lengths, size)
        ]

    def _bucket(self, rows: list[int], firsts: list[int], num_blocks: int, window: int | None) -> DecodeBucket:
        metadata, size = self.metadata, self.block_size
        device = metadata.block_tables.device
        whole = len(rows) == metadata.decode_rows
        row_index = torch.tensor(rows, device=device)
        first = torch.tensor(firsts, device=device)
        columns = first[:, None] + torch.arange(num_blocks, device=device)
        # A window may end before the table does; columns past the row's last block are masked below.
        columns.clamp_(max=metadata.block_tables.shape[1] - 1)
        blocks = metadata.block_tables[row_index[:, None], columns]
        positions = first[:, None] * size + torch.arange(num_blocks * size, device=device)
        contexts = metadata.context_lens[row_index, None]
        hidden = positions >= contexts
        if window:
            hidden |= positions < contexts - window
        mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -math.inf)
        return DecodeBucket(
            rows=slice(0, len(rows)) if whole else row_index,
            count=len(rows),
            blocks=blocks.flatten().long(),
            mask=mask[None, :, None, :],
        )

    def _prefill_rows(self, window: int | None) -> list[PrefillRow]:
        metadata, size = self.metadata, self.block_size
        rows = []
        start = metadata.decode_rows
        for row in range(metadata.decode_rows, len(metadata.counts)):
            count, context = metadata.counts[row], metadata.contexts[row]
            begin = context - count
            first = max(0, begin + 1 - window) // size if window else 0
            num_keys = context - first * size
            rows.append(
                PrefillRow(
                    tokens=slice(start, start + count),
                    blocks=metadata.block_tables[row, first : -(-context // size)].long(),
                    num_keys=num_keys,
                    mask=self._mask(begin - first * size, count, num_keys, window),
                )
            )
            start += count
        return rows

    def _mask(self, begin: int, count: int, num_keys: int, window: int | None) -> Tensor | None:
        """Visibility of keys [0, num_keys) to queries at positions [begin, begin + count)."""
        if begin == 0 and (window is None or count <= window):
            return None
        device = self.metadata.block_tables.device
        distance = torch.arange(begin, begin + count, device=device)[:, None] - torch.arange(num_keys, device=device)
        visible = distance >= 0
        if window:
            visible &= distance < window
        return visible


def cut_into_buckets(lengths: list[int], block_size: int) -> list[list[int]]:
    """Group rows of `lengths` blocks so that little is padded; each group's rows are in ascending order."""
    buckets: list[list[int]] = []
    longest = padding = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        padding += (longest - lengths[row]) * block_size
        full = buckets and (len(buckets[-1]) + 1) * longest * block_size > MAX_BUCKET_TOKENS
        if not buckets or full or padding > MAX_BUCKET_PADDING:
            buckets.append([])
            longest, padding = lengths[row], 0
        buckets[-1].append(row)
    return [sorted(bucket) for bucket in buckets]
