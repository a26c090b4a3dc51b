"""Steps that load every code path before the first request comes."""

from __future__ import annotations

from ..cluster.request import SamplingParams
from ..cluster.step import NULL_BLOCK, NewSequence, StepPlan

EVERY_OPTION = SamplingParams(
    temperature=1.0, top_p=0.9, repetition_penalty=1.1, logit_bias={0: 1.0}, logprobs=1, max_tokens=2
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=2)


def warm_up_steps() -> list[StepPlan]:
    """A prompt and a decode step with every option, and the same greedy. They write the null block only; the decode
    step samples the token after the prompt's first, which has room in the shortest `max_model_len`, 2."""
    steps = []
    for sampling in (EVERY_OPTION, GREEDY):
        new = [NewSequence(0, [0, 0], 1, sampling)]
        steps.append(StepPlan(-2, new, [0], [0], [2], [False], 0, [(0, [NULL_BLOCK])], []))
        steps.append(StepPlan(-1, [], [0], [0], [1], [True], 1, [], []))
    return steps


def long_chunk(max_model_len: int, block_size: int) -> StepPlan:
    """The last tokens of the longest prompt: attention divides it among programs."""
    length = max_model_len - 1
    count = min(2, length)
    new = [NewSequence(0, [0] * length, length, GREEDY)]
    blocks = [NULL_BLOCK] * -(-length // block_size)
    decode_rows = int(count == 1)
    return StepPlan(-1, new, [0], [length - count], [count], [True], decode_rows, [(0, blocks)], [])


def batch_sizes(max_num_batched_tokens: int) -> list[int]:
    """Tokens of further steps, for kernels whose tiles depend on the size of the batch: powers of two and the sizes
    half-way between, up to the largest."""
    sizes = []
    size = 16
    while size < max_num_batched_tokens:
        sizes += [size, size * 3 // 2]
        size *= 2
    return [*(size for size in sizes if size < max_num_batched_tokens), max_num_batched_tokens]
