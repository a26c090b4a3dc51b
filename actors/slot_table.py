"""A shard's mirror of the running sequences: tokens, block tables and sampling parameters, by slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..cluster.step import NULL_BLOCK, NewSequence, StepPlan
from .sampling_table import SamplingTable


class SlotTable:
    """Arrays that are allocated once and never grow.

        slot   tokens                 block_tables      num_blocks
        0      [ 5 17 88 … ]          [ 4  9  0  0 ]    2
        1      [ 2  2 61 … ]          [ 7  0  0  0 ]    1

    A plan's changes are applied in order (`apply`), and every sampled token is written behind its row (`record`), so
    that the next plan can feed it although the scheduler did not know it yet. Tokens behind a sequence's end are
    remains of earlier owners and never read: a row's extent is given by the plan.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        # One column more than a sequence needs: a plan in flight may sample one token past the last.
        self.tokens: NDArray[np.int32] = np.zeros((num_slots, max_model_len + 1), dtype=np.int32)
        blocks_per_sequence = -(-max_model_len // block_size)
        self.block_tables: NDArray[np.int32] = np.full((num_slots, blocks_per_sequence), NULL_BLOCK, dtype=np.int32)
        """[num_slots, blocks of the longest sequence]; null blocks behind a sequence's own."""
        self.num_blocks: list[int] = [0] * num_slots
        self.sampling = SamplingTable(num_slots, vocab_size)

    def apply(self, plan: StepPlan) -> None:
        """Take over what the plan says has changed."""
        for sequence in plan.new:
            self._start(sequence)
        for slot, blocks in plan.new_blocks:
            first = self.num_blocks[slot]
            self.num_blocks[slot] = end = first + len(blocks)
            self.block_tables[slot, first:end] = blocks
        for slot, position, tokens in plan.new_tokens:
            self.tokens[slot, position : position + len(tokens)] = tokens

    def record(self, slots: NDArray[np.int64], positions: NDArray[np.int64], tokens: Sequence[int]) -> None:
        """Write one sampled token per row; `positions[i]` is its place in the sequence."""
        self.tokens[slots, positions] = tokens

    def clear(self) -> None:
        """Forget all sequences."""
        self.tokens.fill(0)
        self.block_tables.fill(NULL_BLOCK)
        self.num_blocks = [0] * len(self.num_blocks)
        self.sampling = SamplingTable(len(self.num_blocks), self._vocab_size)

    def _start(self, sequence: NewSequence) -> None:
        slot, tokens, largest = sequence.slot, sequence.tokens, self._vocab_size - 1
        if min(tokens) < 0 or max(tokens) > largest:
            # What the ingress lets through by mistake must not stop everybody's engine: it is read as the nearest id.
            tokens = [min(max(token, 0), largest) for token in tokens]
        self.tokens[slot, : len(tokens)] = tokens
        self.block_tables[slot, : self.num_blocks[slot]] = NULL_BLOCK
        self.num_blocks[slot] = 0
        self.sampling.set(slot, sequence.sampling, sequence.prompt_len)
