"""What the routers are compared on: lists of requests with and without common beginnings.

```
shared         [group's prefix ······][tail]       groups drawn uniformly; the prefixes exceed one replica's cache
unshared       [······ nothing in common ·······]  of the same lengths
hot            as shared, but most requests are of one group
conversations  [turn][turn][turn][turn]            each turn repeats all of its conversation, and adds to it
```

Everything is a function of the sizes, the seed and the variant: all routers get the same requests in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import msgspec

from ....cluster.errors import ConfigError
from ..prompts import TokenPrompts
from ..workload import BLOCK, PREFIX, UNIQUE, Request


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How large a workload is. Lengths are in tokens."""

    requests: int
    groups: int
    """Prefixes of `shared` and `hot`; conversations of `conversations`."""
    prefix_len: int
    tail_len: int
    """What every request has for itself."""
    output_len: int
    """The same for all, so that the tokens that a replica has generated tell how many requests it had."""
    hot_share: float = 0.7
    """Of the requests of `hot`, those of the hot group."""

    @property
    def prompt_len(self) -> int:
        """Of every prompt; of the last turn of a conversation."""
        return self.prefix_len + self.tail_len

    @property
    def turns(self) -> int:
        """Of a conversation."""
        return max(2, min(self.prompt_len // max(self.tail_len, 1), -(-self.requests // self.groups)))

    def check(self, cache_tokens: int, replicas: int) -> None:
        """
        Raises:
            ConfigError: the prefixes fit into one replica's cache of so many tokens, or not into all of them.
        """
        prefixes = self.groups * self.prefix_len
        if not cache_tokens < prefixes < replicas * cache_tokens:
            raise ConfigError(
                f"{self.groups} prefixes of {self.prefix_len} tokens are {prefixes} tokens; the comparison is about "
                f"more than one replica's cache ({cache_tokens}) and less than all {replicas} hold "
                f"({replicas * cache_tokens}): change --groups, --prefix or --cache-blocks"
            )


def shared(sizes: Sizes, prompts: TokenPrompts, seed: int, variant: int) -> Iterator[Request]:
    """Groups drawn uniformly."""
    rng = random.Random(f"shared/{seed}")
    groups = (rng.randrange(sizes.groups) for _ in range(sizes.requests))
    return _of_groups(sizes, prompts, groups, variant)


def hot(sizes: Sizes, prompts: TokenPrompts, seed: int, variant: int) -> Iterator[Request]:
    """Group 0 gets `hot_share` of the requests, the others the rest."""
    rng = random.Random(f"hot/{seed}")
    groups = (
        0 if rng.random() < sizes.hot_share else rng.randrange(1, max(2, sizes.groups)) for _ in range(sizes.requests)
    )
    return _of_groups(sizes, prompts, groups, variant)


def unshared(sizes: Sizes, prompts: TokenPrompts, seed: int, variant: int) -> Iterator[Request]:
    """Nothing in common. There is nothing to draw, so the seed does not matter."""
    for index in range(sizes.requests):
        yield _request(sizes, prompts.draw(sizes.prompt_len, UNIQUE, variant, index))


def conversations(sizes: Sizes, prompts: TokenPrompts, seed: int, variant: int) -> Iterator[Request]:
    """All first turns in random order, then all second turns, and so on.

    The answers in a prompt are made up, not those that the model gave: only the prompt of the turn before is warm. The
    orders are random, because in a fixed one round robin could by chance send every conversation to one replica.
    """
    rng = random.Random(f"conversations/{seed}")
    left = sizes.requests
    for turn in range(1, sizes.turns + 1):
        length = sizes.prompt_len * turn // sizes.turns
        for conversation in rng.sample(range(sizes.groups), min(left, sizes.groups)):
            left -= 1
            # The beginning of a longer draw with the same key is not the shorter draw, so all is drawn and cut.
            whole = prompts.draw(sizes.prompt_len, BLOCK, variant, conversation)
            yield _request(sizes, whole[:length])


Workload = Callable[[Sizes, TokenPrompts, int, int], Iterator[Request]]
WORKLOADS: dict[str, Workload] = {
    "shared": shared,
    "unshared": unshared,
    "hot": hot,
    "conversations": conversations,
}


def _of_groups(sizes: Sizes, prompts: TokenPrompts, groups: Iterator[int], variant: int) -> Iterator[Request]:
    for index, group in enumerate(groups):
        prefix = prompts.draw(sizes.prefix_len, PREFIX, variant, group)
        yield _request(sizes, prefix + prompts.draw(sizes.tail_len, UNIQUE, variant, index))


def _request(sizes: Sizes, tokens: list[int]) -> Request:
    return Request(tokens, len(tokens), sizes.output_len)
