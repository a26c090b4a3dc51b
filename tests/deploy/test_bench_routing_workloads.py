"""The requests on which routers are compared: as long as promised, repeatable, and shared only where it is said."""

from __future__ import annotations

import collections
from itertools import pairwise, takewhile

import pytest

from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.bench.prompts import TokenPrompts
from raytroupe.deploy.bench.routing.replicas import parse_workloads
from raytroupe.deploy.bench.routing.workloads import WORKLOADS, Sizes

SIZES = Sizes(requests=200, groups=10, prefix_len=64, tail_len=16, output_len=8)
PROMPTS = TokenPrompts(1280, seed=7)


def prompts_of(name: str, sizes: Sizes = SIZES, seed: int = 0, variant: int = 0) -> list[tuple[int, ...]]:
    return [tuple(request.prompt) for request in WORKLOADS[name](sizes, PROMPTS, seed, variant)]


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Tokens that two prompts have in common at their beginnings."""
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))])


@pytest.mark.parametrize("name", WORKLOADS)
def test_requests_repeat_exactly_and_variants_share_nothing(name: str) -> None:
    first = list(WORKLOADS[name](SIZES, PROMPTS, 3, 1))
    assert first == list(WORKLOADS[name](SIZES, PROMPTS, 3, 1))
    others = prompts_of(name, seed=3, variant=2)
    assert [len(request.prompt) for request in first] == [len(prompt) for prompt in others]
    assert max(common(tuple(one.prompt), other) for one in first for other in others) < 4
    assert len(first) <= SIZES.requests
    assert {request.output_len for request in first} == {SIZES.output_len}
    assert all(request.prompt_len == len(request.prompt) for request in first)


@pytest.mark.parametrize("name", ["shared", "hot", "unshared"])
def test_every_prompt_has_the_promised_length(name: str) -> None:
    prompts = prompts_of(name)
    assert len(prompts) == SIZES.requests
    assert {len(prompt) for prompt in prompts} == {SIZES.prompt_len}
    assert len(set(prompts)) == len(prompts), "no request comes twice"


def test_shared_prompts_begin_with_one_of_the_prefixes_and_go_on_alone() -> None:
    prompts = prompts_of("shared")
    groups = collections.Counter(prompt[: SIZES.prefix_len] for prompt in prompts)
    assert len(groups) == SIZES.groups
    assert min(groups.values()) > SIZES.requests / SIZES.groups / 4
    same = [prompt for prompt in prompts if prompt[: SIZES.prefix_len] == prompts[0][: SIZES.prefix_len]]
    assert all(common(same[0], other) < SIZES.prefix_len + 4 for other in same[1:])


def test_unshared_prompts_share_less_than_a_block() -> None:
    prompts = sorted(prompts_of("unshared"))
    assert max(common(one, other) for one, other in pairwise(prompts)) < 4


def test_one_prefix_is_hot() -> None:
    (hottest, *others) = collections.Counter(prompt[: SIZES.prefix_len] for prompt in prompts_of("hot")).most_common()
    assert 0.6 < hottest[1] / SIZES.requests < 0.8
    assert others[0][1] < 0.15 * SIZES.requests


def test_a_turn_repeats_the_one_before_it() -> None:
    by_conversation: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prompt in prompts_of("conversations"):
        by_conversation.setdefault(prompt[:8], []).append(prompt)
    assert len(by_conversation) == SIZES.groups
    for turns in by_conversation.values():
        assert len(turns) == SIZES.turns
        assert len(turns[-1]) == SIZES.prompt_len
        for before, after in pairwise(turns):
            assert len(before) < len(after)
            assert after[: len(before)] == before


def test_prefixes_have_to_exceed_one_cache_and_fit_into_all() -> None:
    SIZES.check(cache_tokens=400, replicas=4)
    for cache_tokens in (640, 160):
        with pytest.raises(ConfigError, match="10 prefixes of 64 tokens are 640 tokens"):
            SIZES.check(cache_tokens, replicas=4)


def test_unknown_workloads_are_refused() -> None:
    assert parse_workloads("hot, shared") == ["hot", "shared"]
    assert parse_workloads("all") == list(WORKLOADS)
    for text in ("cold", "hot,hot"):
        with pytest.raises(ConfigError, match=f"--workloads '{text}'"):
            parse_workloads(text)
