"""Logits at every position of given sequences: what a model is judged by, where a request needs those of its last
position only.

The rows of a step go through the decoder, the kernels and the KV cache that answer requests, so that what these lose
is measured too.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from ..cluster.model_spec import ModelSpec
from ..cluster.request import SamplingParams
from ..cluster.step import NewSequence, StepPlan
from .decoder import Decoder
from .kv_cache import KVCache
from .shard_config import ShardConfig
from .slot_table import SlotTable
from .step_inputs import StepInputs


class Chunk(msgspec.Struct, frozen=True):
    """Positions `start` to `stop` of one of several sequences."""

    sequence: int
    start: int
    stop: int


def plan_scoring(lengths: Sequence[int], max_tokens: int, max_rows: int) -> list[list[Chunk]]:
    """Steps of at most `max_tokens` tokens in at most `max_rows` rows, which compute every position of every sequence
    once and in order. A sequence that is longer than a step has steps of its own."""
    steps: list[list[Chunk]] = []
    step: list[Chunk] = []
    tokens = 0
    for sequence, length in enumerate(lengths):
        if step and (tokens + length > max_tokens or len(step) == max_rows):
            steps.append(step)
            step, tokens = [], 0
        if length > max_tokens:
            starts = range(0, length, max_tokens)
            steps += [[Chunk(sequence, start, min(start + max_tokens, length))] for start in starts]
        else:
            step.append(Chunk(sequence, 0, length))
            tokens += length
    if step:
        steps.append(step)
    # Rows of one token come first in a step.
    return [sorted(chunks, key=lambda chunk: chunk.stop - chunk.start > 1) for chunks in steps]


class SequenceScorer:
    """Runs the steps of `plan_scoring` on a shard that holds a whole model.

    It writes the KV cache from its first block on. No request may be running, and none may find cached blocks
    afterwards: the engine is to be one without prefix caching.
    """

    def __init__(
        self, decoder: Decoder, kv_cache: KVCache, spec: ModelSpec, config: ShardConfig, device: torch.device
    ) -> None:
        self._decoder, self._kv_cache, self._device = decoder, kv_cache, device
        self._block_size = config.block_size
        self._table = SlotTable(config.max_num_seqs, config.max_model_len, config.block_size, spec.vocab_size)
        self._inputs = StepInputs(
            self._table,
            block_size=config.block_size,
            max_num_batched_tokens=config.max_num_batched_tokens,
            device=device,
        )

    def forward(self, step: Sequence[Chunk], sequences: Sequence[list[int]]) -> Tensor:
        """Run one step; earlier chunks of its sequences must have been run just before it.

        Returns:
            [T, hidden] for `logits`, the chunks one after the other; valid until the next call.
        """
        plan = self._plan(step, sequences)
        self._table.apply(plan)
        inputs = self._inputs.build(plan)
        return self._decoder.forward(inputs.tokens, None, inputs.metadata, self._kv_cache)

    def logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """[len(rows), vocab] float32 for the given rows of `hidden`; valid until the next call."""
        return self._decoder.logits(hidden, torch.tensor(rows, dtype=torch.int64, device=self._device))

    def _plan(self, step: Sequence[Chunk], sequences: Sequence[list[int]]) -> StepPlan:
        """The step as a plan that needs nothing of the steps before it but what they wrote to the cache."""
        new, blocks, free = [], [], 1
        for slot, chunk in enumerate(step):
            tokens = sequences[chunk.sequence][: chunk.stop]
            new.append(NewSequence(slot, tokens, len(tokens), SamplingParams(temperature=0.0)))
            needed = -(-len(tokens) // self._block_size)
            blocks.append((slot, list(range(free, free + needed))))
            free += needed
        assert free <= self._kv_cache.num_blocks, f"{free} blocks for a cache of {self._kv_cache.num_blocks}"
        counts = [chunk.stop - chunk.start for chunk in step]
        return StepPlan(
            step=0,
            new=new,
            slots=list(range(len(step))),
            starts=[chunk.start for chunk in step],
            counts=counts,
            samples=[False] * len(step),
            decode_rows=counts.count(1),
            new_blocks=blocks,
            new_tokens=[],
        )
