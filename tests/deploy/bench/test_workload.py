"""Requests come when the process says, repeat where they should and are new where a cache would lie."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.bench.lengths import parse_lengths
from raytroupe.deploy.bench.prompts import TokenPrompts, text_prompts
from raytroupe.deploy.bench.workload import Request, SharedPrefixes, poisson_arrivals, synthetic
from raytroupe.deploy.make_bench_model import byte_tokenizer
from raytroupe.deploy.model_folder import DEMO_MODELS


def requests(
    count: int, *, seed: int = 0, variant: int = 1, prompt_seed: int = 9, prefixes: SharedPrefixes | None = None
) -> list[Request]:
    endless = synthetic(
        TokenPrompts(30_000, prompt_seed),
        parse_lengths("uniform:8:24"),
        parse_lengths("uniform:2:9"),
        poisson_arrivals(math.inf, 0),
        seed=seed,
        variant=variant,
        prefixes=prefixes,
    )
    return list(itertools.islice(endless, count))


def test_poisson_gaps_are_exponential() -> None:
    arrivals = list(itertools.islice(poisson_arrivals(4.0, seed=1), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05), "deviation and mean are equal"
    memoryless = [gap for gap in gaps if gap > 0.25]
    assert len(memoryless) / len(gaps) == pytest.approx(math.exp(-1), rel=0.05)


def test_poisson_arrivals_repeat_with_their_seed() -> None:
    first, again, other = (list(itertools.islice(poisson_arrivals(2.0, seed), 50)) for seed in (3, 3, 4))
    assert first == again != other


def test_infinite_rate_is_all_at_once() -> None:
    assert set(itertools.islice(poisson_arrivals(math.inf, 0), 10)) == {0.0}


def test_seed_decides_lengths_and_not_tokens() -> None:
    one, same, other = requests(40), requests(40, prompt_seed=10), requests(40, seed=1)

    def lengths(some: list[Request]) -> list[tuple[int, int]]:
        return [(request.prompt_len, request.output_len) for request in some]

    assert lengths(one) == lengths(same) != lengths(other)
    assert all(a.prompt[:8] != b.prompt[:8] for a, b in zip(one, same, strict=True))
    assert requests(40) == one


def test_loads_of_a_sweep_share_no_prompts() -> None:
    beginnings = {tuple(request.prompt[:8]) for variant in (0, 1, 2) for request in requests(30, variant=variant)}
    assert len(beginnings) == 90


def test_prompts_have_the_stated_length_and_range() -> None:
    for request in requests(50):
        assert len(request.prompt) == request.prompt_len
        assert all(16 <= token < 30_000 for token in request.prompt)


def test_shared_prefixes_are_shared_within_their_group_only() -> None:
    drawn = requests(200, prefixes=SharedPrefixes(groups=3, length=50))
    assert len({tuple(request.prompt[:50]) for request in drawn}) == 3
    assert len({tuple(request.prompt[:51]) for request in drawn}) > 190
    assert all(58 <= request.prompt_len == len(request.prompt) <= 74 for request in drawn)


@pytest.mark.parametrize("source", ["demo-large", "bytes"])
def test_texts_have_exactly_the_tokens_asked_for(source: str, tmp_path: Path) -> None:
    folder = Path(DEMO_MODELS[0])
    if source == "bytes":
        folder = tmp_path
        byte_tokenizer(32_000).save_pretrained(folder)
    prompts = text_prompts(folder, seed=1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for length in (2, 17, 300):
        text = prompts.finish(prompts.draw(length, 0, length))
        assert isinstance(text, str)
        assert len(tokenizer.encode(text).ids) == length


def test_texts_without_a_tokenizer_have_a_word_per_token() -> None:
    prompts = text_prompts(None, seed=1)
    assert len(str(prompts.finish(prompts.draw(40, 1))).split()) == 40


def test_bad_tokenizer_and_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        text_prompts(tmp_path, 0)
    with pytest.raises(ConfigError, match="--vocab-size 16"):
        TokenPrompts(16, 0)
