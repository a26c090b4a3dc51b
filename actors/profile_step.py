"""The step that takes the most memory, for measuring it before there is a cache."""

from __future__ import annotations

from ..cluster.request import SamplingParams
from ..cluster.step import NULL_BLOCK, NewSequence, StepPlan


def largest_step(
    *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int, vocab_size: int
) -> StepPlan:
    """As many tokens in as many rows as a step may have, all rows sampled with every option.

    All sequences live in the null block, so a cache of one block suffices. Most rows have one token, and the last ones
    share the rest; the first one stands at the end of the longest context, which makes every table that is as wide as
    the longest row as wide as it gets. Tokens are zeros.

        starts   [ longest - 1, 0, 0, …,  0 ]
        counts   [ 1,           1, 1, …, 961 ]       64 sequences, 1024 tokens

    Returns:
        A plan with step number -1. Fewer tokens than `max_num_batched_tokens` where all sequences hold fewer.
    """
    longest = max(1, max_model_len - 1)  # the sampled token needs a place
    rows = min(max_num_seqs, max_num_batched_tokens)
    counts = [1] * rows
    rest = max_num_batched_tokens - rows
    for row in reversed(range(rows)):
        more = min(rest, longest - 1)
        counts[row] += more
        rest -= more
    starts = [longest - counts[0]] + [0] * (rows - 1)
    sampling = _every_option(vocab_size)
    tokens = {length: [0] * length for length in {start + count for start, count in zip(starts, counts, strict=True)}}
    new, new_blocks = [], []
    for slot, (start, count) in enumerate(zip(starts, counts, strict=True)):
        length = start + count
        new.append(NewSequence(slot, tokens[length], length, sampling))
        new_blocks.append((slot, [NULL_BLOCK] * -(-length // block_size)))
    return StepPlan(
        step=-1,
        new=new,
        slots=list(range(rows)),
        starts=starts,
        counts=counts,
        samples=[True] * rows,
        decode_rows=counts.count(1),
        new_blocks=new_blocks,
        new_tokens=[],
    )


def _every_option(vocab_size: int) -> SamplingParams:
    """Of filters the widest: top_k of the whole vocabulary orders all of it."""
    return SamplingParams(
        temperature=1.0,
        top_p=0.9,
        top_k=vocab_size,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={0: 1.0},
        logprobs=20,
        max_tokens=2,
        min_tokens=1,
        stop_token_ids=(0,),
    )
