"""A shard's mirror of the running sequences where the device samples ahead of the host: see `slot_table.py`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..cluster.step import StepPlan
from ..kernels.gpu.step import update
from ..kernels.uploads import Uploads
from .sampling_table import SamplingTable

Segments = list[tuple[int, int, NDArray[np.int32]]]
"""(slot, first column, values)."""


class DeviceTables:
    """Known tokens and block tables of all slots on the device; the host knows the sampling parameters only.

    What lies behind a sequence's tokens and blocks are remains of earlier owners, which no kernel reads.
    """

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self._vocab_size = vocab_size
        # One column more than a sequence needs: a plan in flight may sample one token past the last.
        self.tokens = torch.zeros(num_slots, max_model_len + 1, dtype=torch.int32, device=device)
        """[num_slots, max_model_len + 1] int32."""
        self.block_tables = torch.zeros(num_slots, -(-max_model_len // block_size), dtype=torch.int32, device=device)
        """[num_slots, blocks of the longest sequence] int32."""
        self.sampling = SamplingTable(num_slots, vocab_size)
        self._num_blocks = [0] * num_slots
        self._uploads = Uploads(device)

    def apply(self, plan: StepPlan) -> dict[int, int]:
        """Take over what the plan says has changed.

        Returns:
            By slot, the new last block of sequences that only grew by one: the step's own inputs bring it along
            (`kernels/gpu/step.py`), so that a decode step has nothing else to upload.
        """
        tokens: Segments = []
        blocks: Segments = []
        growth: dict[int, int] = {}
        for sequence in plan.new:
            # What the ingress lets through by mistake must not stop everybody's engine: it is read as the nearest id.
            known = np.clip(np.array(sequence.tokens, dtype=np.int64), 0, self._vocab_size - 1).astype(np.int32)
            tokens.append((sequence.slot, 0, known))
            self._num_blocks[sequence.slot] = 0
            self.sampling.set(sequence.slot, sequence.sampling, sequence.prompt_len)
        decoding = set(plan.slots[: plan.decode_rows]) - {sequence.slot for sequence in plan.new}
        for slot, ids in plan.new_blocks:
            first = self._num_blocks[slot]
            self._num_blocks[slot] += len(ids)
            if len(ids) == 1 and slot in decoding:
                growth[slot] = ids[0]
            else:
                blocks.append((slot, first, np.array(ids, dtype=np.int32)))
        for slot, position, ids in plan.new_tokens:
            tokens.append((slot, position, np.array(ids, dtype=np.int32)))
        self._upload(tokens, blocks)
        return growth

    def clear(self) -> None:
        """Forget all sequences."""
        self._num_blocks = [0] * len(self._num_blocks)
        self.sampling = SamplingTable(len(self._num_blocks), self._vocab_size)

    def _upload(self, tokens: Segments, blocks: Segments) -> None:
        changes = {name: segments for name, segments in (("tokens", tokens), ("blocks", blocks)) if segments}
        if not changes:
            return
        arrays: dict[str, NDArray] = {}
        for name, segments in changes.items():
            lengths = np.array([len(values) for _, _, values in segments])
            described = [(slot, column, 0, 0) for slot, column, _ in segments]
            arrays[name] = np.array(described, dtype=np.int32)
            arrays[name][:, 2] = np.cumsum(lengths) - lengths
            arrays[name][:, 3] = lengths
            arrays[f"{name}' values"] = np.concatenate([values for _, _, values in segments])
        uploaded = self._uploads(arrays)
        for name, segments in changes.items():
            table = self.tokens if name == "tokens" else self.block_tables
            longest = max(len(values) for _, _, values in segments)
            update(table, uploaded[f"{name}' values"], uploaded[name], longest)
