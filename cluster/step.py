"""The protocol between the scheduler and its shards: one `StepPlan` out, one `StepResult` back.

A shard keeps, for every *slot*, the sequence's known tokens, its block table and its sampling parameters. A plan
carries a new sequence whole once (`NewSequence`, which overwrites the slot) and afterwards only what changed. Plans
are executed in order, so a slot or block may be given to another sequence as soon as its owner is done with it.

A row is one sequence's share of one step: `counts[i]` tokens of slot `slots[i]`, beginning at position `starts[i]`.
Rows with one token come first; the first `decode_rows` rows have exactly one token.

    slots   [ 3, 0, 7,  2 ]
    starts  [41, 9, 12, 0 ]
    counts  [ 1, 1, 1, 64 ]      decode_rows = 3, 67 tokens in all
    samples [ T, T, T,  F ]      row 3 is a chunk of a longer prompt
"""

from __future__ import annotations

import msgspec

from .request import SamplingParams, TokenLogprobs


class NewSequence(msgspec.Struct, array_like=True):
    """A sequence that the shards do not know, or no longer know."""

    slot: int
    tokens: list[int]
    """Known tokens: the prompt, then `len(tokens) - prompt_len` generated ones."""
    prompt_len: int
    sampling: SamplingParams


class StepPlan(msgspec.Struct, array_like=True):
    """One engine step for all shards of a replica."""

    step: int
    new: list[NewSequence]
    slots: list[int]
    starts: list[int]
    counts: list[int]
    samples: list[bool]
    """Row ends at the last token of its sequence, so the next token is sampled from it."""
    decode_rows: int
    new_blocks: list[tuple[int, list[int]]]
    """(slot, block ids to append to the slot's block table). For a new sequence this is its whole table."""
    new_tokens: list[tuple[int, int, list[int]]]
    """(slot, position of the first, tokens) that not every shard has sampled itself; used with pipeline stages."""


class StepResult(msgspec.Struct, array_like=True):
    """What the output shard reports: one token for every row that samples, in row order."""

    step: int
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None
    """One entry per sampled token if any row asked for log-probabilities."""
    model_seconds: float
    """Wall time in the model's forward pass and sampling."""
    total_seconds: float
    """The same, with building the inputs."""


NULL_BLOCK = 0
"""Block 0 belongs to no sequence: padding rows read and write it."""
