"""What is sent and when: requests with arrival times, prompts and output lengths, one after the other."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import msgspec

from .lengths import Lengths
from .prompts import PromptSource
from .traces import MOONCAKE_BLOCK, TraceEntry

Prompt = list[int] | str
"""Token ids or text."""

UNIQUE, PREFIX, BLOCK = range(3)
"""First part of the key of a drawn piece of prompt: so that pieces of different kinds are never the same."""


class Request(msgspec.Struct, frozen=True):
    """One request of a workload."""

    prompt: Prompt
    prompt_len: int
    output_len: int
    arrival: float = 0.0
    """Seconds after the start; without meaning in a closed loop."""


class SharedPrefixes(msgspec.Struct, frozen=True):
    """A workload whose prompts begin with one of `groups` texts of `length` tokens, as those of `groups` agents do."""

    groups: int
    length: int


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Arrival times of a Poisson process with `rate` requests/s, from 0 on; `inf`: all at 0."""
    rng = random.Random(f"arrivals/{seed}")
    now = 0.0
    while True:
        yield now
        if math.isfinite(rate):
            now += rng.expovariate(rate)


def synthetic(
    prompts: PromptSource,
    prompt_len: Lengths,
    output_len: Lengths,
    arrivals: Iterator[float],
    *,
    seed: int,
    variant: int,
    prefixes: SharedPrefixes | None = None,
) -> Iterator[Request]:
    """Requests without end.

    `seed` decides the lengths and the groups: the same work every time. `variant` and the seed of `prompts` decide the
    tokens, so that the runs of a sweep share no prompts.

    Args:
        prompt_len: of the part that no other request has, if there are `prefixes`.
    """
    rng = random.Random(f"lengths/{seed}")
    for index, arrival in zip(itertools.count(), arrivals, strict=False):
        tokens = prompts.draw(prompt_len(rng), UNIQUE, variant, index)
        if prefixes is not None:
            group = rng.randrange(prefixes.groups)
            tokens = prompts.draw(prefixes.length, PREFIX, variant, group) + tokens
        yield Request(prompts.finish(tokens), len(tokens), output_len(rng), arrival)


def recorded(
    prompts: PromptSource, entries: list[TraceEntry], *, variant: int, length_scale: float = 1.0
) -> Iterator[Request]:
    """The requests of a trace whose lengths have been scaled by `length_scale`.

    Prompts with equal first hash ids have equal first blocks; what the ids do not cover is the request's own.
    """
    block = max(1, round(MOONCAKE_BLOCK * length_scale))
    for index, entry in enumerate(entries):
        tokens: list[int] = []
        for hash_id in entry.hash_ids:
            tokens += prompts.draw(block, BLOCK, variant, hash_id)
        tokens = tokens[: entry.prompt_len]
        if len(tokens) < entry.prompt_len:
            tokens += prompts.draw(entry.prompt_len - len(tokens), UNIQUE, variant, index)
        yield Request(prompts.finish(tokens), entry.prompt_len, entry.output_len, entry.arrival)
