"""A step of a paged cache written by hand, on any device: no scheduler, no runner."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....kernels.attention_metadata import AttentionMetadata

BLOCK_SIZE = 16


def blocks_needed(rows: Sequence[tuple[int, int]], block_size: int = BLOCK_SIZE) -> int:
    """KV blocks, with the null block, that hold the sequences of `rows`."""
    return 1 + sum(-(-context // block_size) for _, context in rows)


def paged_step(
    rows: Sequence[tuple[int, int]], device: torch.device, *, block_size: int = BLOCK_SIZE, seed: int = 0
) -> AttentionMetadata:
    """Describe rows (query tokens, context after the step), those of one token first, each its own sequence.

    Block ids are shuffled, as in a cache that has been in use for a while.
    """
    counts, contexts = [count for count, _ in rows], [context for _, context in rows]
    assert counts == sorted(counts, key=lambda count: count != 1), "rows of one token come first"
    lengths = [-(-context // block_size) for context in contexts]
    shuffled = 1 + torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(seed))
    tables = torch.zeros(len(rows), max(lengths), dtype=torch.int32)
    positions, slots = [], []
    first = 0
    for row, (count, context, length) in enumerate(zip(counts, contexts, lengths, strict=True)):
        table = shuffled[first : first + length]
        first += length
        tables[row, :length] = table
        own = torch.arange(context - count, context)
        positions.append(own)
        slots.append(table[own // block_size] * block_size + own % block_size)
    return AttentionMetadata(
        positions=torch.cat(positions).to(device),
        slot_mapping=torch.cat(slots).to(device),
        query_start=torch.tensor([0, *counts]).cumsum(0).int().to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32).to(device),
        block_tables=tables.to(device),
        decode_rows=sum(count == 1 for count in counts),
        counts=counts,
        contexts=contexts,
    )
