"""Hidden states of the calibration sequences on disk, between one layer and the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...cluster.errors import CheckpointError
from ...kernels.attention_metadata import AttentionMetadata
from .durable_files import reserve

BATCH_TOKENS = 2048
"""Rows that go through a layer at once; a longer sequence goes alone."""
BLOCK_SIZE = 16


class Batches:
    """Calibration sequences, cut into batches that follow one another in the rows of the hidden states."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.tokens = sum(lengths)
        self._batches: list[list[int]] = []
        for length in lengths:
            if not self._batches or sum(self._batches[-1]) + length > BATCH_TOKENS:
                self._batches.append([])
            self._batches[-1].append(length)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[slice, AttentionMetadata]]:
        """The rows of each batch, and how its sequences lie in a KV cache."""
        start = 0
        for lengths in self._batches:
            yield slice(start, start + sum(lengths)), _metadata(lengths)
            start += sum(lengths)

    @property
    def num_blocks(self) -> int:
        """KV blocks that the largest batch needs."""
        return max((sum(-(-length // BLOCK_SIZE) for length in lengths) for lengths in self._batches), default=1)


def _metadata(lengths: list[int]) -> AttentionMetadata:
    """Whole sequences of at least two tokens, each in blocks of its own."""
    starts, tables, used = [0], [], 0
    positions: list[int] = []
    slots: list[int] = []
    for length in lengths:
        blocks = -(-length // BLOCK_SIZE)
        tables.append(list(range(used, used + blocks)))
        positions += range(length)
        slots += range(used * BLOCK_SIZE, used * BLOCK_SIZE + length)
        starts.append(starts[-1] + length)
        used += blocks
    width = max(map(len, tables))
    return AttentionMetadata(
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=torch.tensor([(table + [0] * width)[:width] for table in tables], dtype=torch.int32),
        decode_rows=0,
        counts=lengths,
        contexts=lengths,
    )


def create_hidden_states(file: Path, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """[tokens, width] in a new file; what is written to the tensor is written to it.

    Raises:
        CheckpointError: the disk is full.
    """
    reserve(file, tokens * width * dtype.itemsize)
    return torch.from_file(str(file), shared=True, size=tokens * width, dtype=dtype).view(tokens, width)


def open_hidden_states(file: Path, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """[tokens, width] of a file that was written before; changes of the tensor do not reach it.

    Raises:
        CheckpointError: the file is missing or has another size.
    """
    needed, found = tokens * width * dtype.itemsize, file.stat().st_size if file.is_file() else None
    if found != needed:
        state = "is missing" if found is None else f"has {found:,} bytes instead of {needed:,}"
        raise CheckpointError(f"{file} {state}; what was begun cannot be finished, use --restart to begin anew")
    return torch.from_file(str(file), shared=False, size=tokens * width, dtype=dtype).view(tokens, width)
