"""What the torch attention works out once per step for all layers: which rows go together, which blocks to gather.

Decode rows have one query each. Rows of similar length share one batched product; a long row among short ones would
pad them all, so lengths are cut into buckets:

    contexts (in blocks)  [ 9 10 9 8 | 64 ]   →   bucket of 4 rows padded to 10 blocks, bucket of 1 row with 64

Prefill rows are computed one by one. A sliding window moves the first block that is gathered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from .attention_metadata import AttentionMetadata

MAX_BUCKET_TOKENS = 16384
"""Gathered keys of a bucket, padding included: bounds the workspace."""
MAX_BUCKET_PADDING = 1024
"""Padded keys that a bucket may hold before a second one is cheaper."""
MAX_MASK_ELEMENTS = 2**22
"""Queries times keys of a prefill row that are worked on at once: bounds the mask and the scores of a head."""


@dataclasses.dataclass(slots=True)
class DecodeBucket:
    """r rows with one query each, padded to n blocks."""

    rows: Tensor | slice
    """Which of the step's rows, as an index into the T query tokens."""
    count: int
    blocks: Tensor
    """[r * n] int64: block ids."""
    hidden: Tensor
    """[1, r, 1, n * block size] bool: True where a row must not look. What lies there may be anything finite."""


@dataclasses.dataclass(slots=True)
class PrefillRow:
    """One row with many queries."""

    tokens: slice
    """Its query tokens."""
    blocks: Tensor
    """[n] int64: block ids, from the first that any query sees."""
    num_keys: int
    """Keys in those blocks, without the tail of the last one."""
    begin: int
    """Index among the keys of the first query's own."""
    window: int | None

    def chunks(self) -> Iterator[tuple[slice, Tensor | None]]:
        """The queries in pieces of bounded size, each as a slice of the row's with the keys that it may see: a mask
        [queries of the piece, num_keys] bool, or None for causal from the first key on (then there is one piece only).
        """
        count = self.tokens.stop - self.tokens.start
        if self.begin == 0 and (self.window is None or count <= self.window) and count * count <= MAX_MASK_ELEMENTS:
            yield slice(0, count), None
            return
        keys = torch.arange(self.num_keys, device=self.blocks.device)
        step = max(1, MAX_MASK_ELEMENTS // self.num_keys)
        for start in range(0, count, step):
            stop = min(start + step, count)
            last = torch.arange(self.begin + start, self.begin + stop, device=self.blocks.device)[:, None]
            visible = keys <= last
            if self.window:
                visible &= keys > last - self.window
            yield slice(start, stop), visible


@dataclasses.dataclass(slots=True)
class AttentionPlan:
    """A step's rows, arranged for one window size at a time."""

    metadata: AttentionMetadata
    block_size: int
    _buckets: dict[int | None, list[DecodeBucket]] = dataclasses.field(default_factory=dict)
    _prefill_rows: dict[int | None, list[PrefillRow]] = dataclasses.field(default_factory=dict)

    def decode_buckets(self, window: int | None) -> list[DecodeBucket]:
        """The rows with one query, for layers with this window; worked out at the first of them."""
        if window not in self._buckets:
            self._buckets[window] = self._cut(window)
        return self._buckets[window]

    def prefill_rows(self, window: int | None) -> list[PrefillRow]:
        """The other rows, likewise."""
        if window not in self._prefill_rows:
            self._prefill_rows[window] = self._arrange(window)
        return self._prefill_rows[window]

    def _cut(self, window: int | None) -> list[DecodeBucket]:
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
        return DecodeBucket(
            rows=slice(0, len(rows)) if whole else row_index,
            count=len(rows),
            blocks=blocks.flatten().long(),
            hidden=hidden[None, :, None, :],
        )

    def _arrange(self, window: int | None) -> list[PrefillRow]:
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
                    begin=begin - first * size,
                    window=window,
                )
            )
            start += count
        return rows


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
