"""From a plan and the slot table to the tensors of one step, without a loop over tokens or rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cluster.step import StepPlan
from ..kernels.attention_metadata import AttentionMetadata
from .leading_views import leading_views
from .slot_table import SlotTable


class StagedArray:
    """A preallocated host array and its image on the device; on the CPU both are the same memory."""

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        on_host = device.type == "cpu"
        self._host = torch.zeros(capacity, dtype=dtype, pin_memory=not on_host)
        self._device = self._host if on_host else torch.zeros(capacity, dtype=dtype, device=device)
        self.array: NDArray = self._host.numpy()
        self._host_views, self._device_views = leading_views(self._host), leading_views(self._device)

    def upload(self, *shape: int) -> Tensor:
        """The first elements on the device, in that shape; valid until the array is written again."""
        uploaded = self._device_views(*shape)
        if self._device is not self._host:
            uploaded.copy_(self._host_views(*shape), non_blocking=True)
        return uploaded


@dataclasses.dataclass(slots=True)
class SampledRows:
    """The S rows of a step whose next token is sampled."""

    slots: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """[S] known tokens, which is the position of the sampled token."""
    last_tokens: Tensor
    """[S] int64 on the device: index among the step's T tokens of each row's last."""


@dataclasses.dataclass(slots=True)
class PreparedStep:
    """The tensors of one step; valid until the next is built."""

    tokens: Tensor
    """[T] int64."""
    metadata: AttentionMetadata
    sampled: SampledRows


class StepInputs:
    """Builds steps of at most `max_num_batched_tokens` tokens in at most `max_num_seqs` rows."""

    def __init__(self, table: SlotTable, *, block_size: int, max_num_batched_tokens: int, device: torch.device) -> None:
        self._table = table
        self._block_size = block_size
        num_slots, blocks_per_sequence = table.block_tables.shape
        num_tokens = max_num_batched_tokens
        self._tokens = StagedArray(num_tokens, torch.int64, device)
        self._positions = StagedArray(num_tokens, torch.int64, device)
        self._slot_mapping = StagedArray(num_tokens, torch.int64, device)
        self._query_start = StagedArray(num_slots + 1, torch.int32, device)
        self._context_lens = StagedArray(num_slots, torch.int32, device)
        self._block_tables = StagedArray(num_slots * blocks_per_sequence, torch.int32, device)
        self._last_tokens = StagedArray(num_slots, torch.int64, device)
        self._arange = np.arange(max(num_tokens, num_slots) + 1, dtype=np.int64)
        # The device may still be reading the host arrays of the step before when a stage does not wait for results.
        self._uploaded = torch.cuda.Event() if device.type == "cuda" else None

    def build(self, plan: StepPlan) -> PreparedStep:
        """Describe the plan's rows; the slot table must already hold the plan's changes."""
        if self._uploaded is not None:
            self._uploaded.synchronize()
        table, block_size = self._table, self._block_size
        slots = np.array(plan.slots, dtype=np.int64)
        starts = np.array(plan.starts, dtype=np.int64)
        num_rows = len(slots)
        # Token i of the step is one of slot_of[i] and stands at positions[i] of its sequence.
        if plan.decode_rows == num_rows:  # most steps: one token in every row, so that no row is repeated
            num_tokens, slot_of, contexts = num_rows, slots, starts + 1
            ends = self._arange[1 : num_rows + 1]
            positions = self._positions.array[:num_tokens]
            positions[:] = starts
        else:
            counts = np.array(plan.counts, dtype=np.int64)
            ends = np.cumsum(counts)
            contexts = starts + counts
            num_tokens = int(ends[-1])
            row_of = np.repeat(self._arange[:num_rows], counts)
            positions = self._positions.array[:num_tokens]
            np.add(self._arange[:num_tokens], (contexts - ends)[row_of], out=positions)
            slot_of = slots[row_of]
        self._tokens.array[:num_tokens] = table.tokens[slot_of, positions]
        blocks = table.block_tables[slot_of, positions // block_size].astype(np.int64)
        np.add(blocks * block_size, positions % block_size, out=self._slot_mapping.array[:num_tokens])

        self._query_start.array[1 : num_rows + 1] = ends
        self._context_lens.array[:num_rows] = contexts
        width = -(-int(contexts.max()) // block_size)
        block_tables = self._block_tables.array[: num_rows * width].reshape(num_rows, width)
        np.take(table.block_tables[:, :width], slots, axis=0, out=block_tables, mode="clip")

        sampled = np.flatnonzero(np.array(plan.samples, dtype=np.bool_))
        self._last_tokens.array[: len(sampled)] = ends[sampled] - 1

        step = PreparedStep(
            tokens=self._tokens.upload(num_tokens),
            metadata=AttentionMetadata(
                positions=self._positions.upload(num_tokens),
                slot_mapping=self._slot_mapping.upload(num_tokens),
                query_start=self._query_start.upload(num_rows + 1),
                context_lens=self._context_lens.upload(num_rows),
                block_tables=self._block_tables.upload(num_rows, width),
                decode_rows=plan.decode_rows,
                counts=plan.counts,
                contexts=contexts.tolist(),
            ),
            sampled=SampledRows(slots[sampled], contexts[sampled], self._last_tokens.upload(len(sampled))),
        )
        if self._uploaded is not None:
            self._uploaded.record()
        return step
