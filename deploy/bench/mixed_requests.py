"""The requests that the benchmarks send: mixed lengths from a seeded generator, the same on every machine."""

from __future__ import annotations

import random

import msgspec


class BenchRequest(msgspec.Struct, frozen=True):
    """A prompt and the number of tokens to generate, whatever they are."""

    prompt: list[int]
    output_len: int


def mixed_requests(
    count: int,
    vocab_size: int,
    *,
    prompt_len: tuple[int, int] = (16, 256),
    output_len: tuple[int, int] = (16, 128),
    seed: int = 0,
    variant: int = 0,
) -> list[BenchRequest]:
    """`count` requests of random tokens; lengths are uniform in the given ranges, ends included.

    `seed` decides the lengths. `variant` decides the tokens: another one gives the same work without a prompt that
    the prefix cache has seen. The first 16 token ids are left out, because special tokens usually stand there.
    """
    lengths = random.Random(seed)
    tokens = random.Random(f"{seed}/{variant}")
    return [
        BenchRequest(
            [tokens.randrange(16, vocab_size) for _ in range(lengths.randint(*prompt_len))],
            lengths.randint(*output_len),
        )
        for _ in range(count)
    ]


def wanted_tokens(requests: list[BenchRequest]) -> int:
    """Tokens that the requests ask for."""
    return sum(request.output_len for request in requests)
