"""A sampled request draws the same tokens wherever and however it runs: (seed, position) decides, fp32."""

from __future__ import annotations

import random

import msgspec
import pytest
from tiny_models import VOCAB_SIZE, make_tiny_model

from raytroupe.actors.local_engine import LocalEngine
from raytroupe.cluster.request import EngineRequest, SamplingParams

PROMPT = [5, 9, 13, 21, 34, 55, 89, 3, 4, 5, 6, 7, 8, 100, 101]
CHOICES = {
    "plain": SamplingParams(temperature=1.0, seed=7, max_tokens=40),
    "filtered": SamplingParams(temperature=0.8, top_p=0.9, top_k=30, min_p=0.01, seed=2**64 - 1, max_tokens=40),
    "penalised": SamplingParams(
        temperature=1.3,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logit_bias={11: 3.0, 12: -100.0},
        min_tokens=20,
        stop_token_ids=(17,),
        seed=12345,
        max_tokens=40,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Weights that leave the distribution wide: a draw must have something to choose from.
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "wide", initializer_range=0.08)


def make_engine(folder, **fields) -> LocalEngine:
    defaults = {"dtype": "float32", "device": "cpu", "num_threads": 1, "block_size": 8, "max_model_len": 96}
    return LocalEngine(folder, **(defaults | fields))


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, list[int]]:
    with make_engine(folder) as engine:
        return {name: engine.generate([PROMPT], params)[0].tokens for name, params in CHOICES.items()}


def others(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 40))] for _ in range(count)]
    return prompts, [
        SamplingParams(temperature=rng.choice([0.0, 0.7, 1.0]), seed=i, max_tokens=40) for i in range(count)
    ]


def test_draws_are_varied_and_depend_on_the_seed(folder, alone):
    assert len(set(alone["plain"])) > 15
    with make_engine(folder) as engine:
        other = msgspec.structs.replace(CHOICES["plain"], seed=8)
        assert engine.generate([PROMPT], other)[0].tokens != alone["plain"]


@pytest.mark.parametrize("name", CHOICES)
def test_in_a_batch_of_32(name, folder, alone):
    prompts, choices = others(31)
    with make_engine(folder) as engine:
        completions = engine.generate(
            [*prompts[:16], PROMPT, *prompts[16:]], [*choices[:16], CHOICES[name], *choices[16:]]
        )
    assert completions[16].tokens == alone[name]


@pytest.mark.parametrize("name", CHOICES)
def test_after_preemption(name, folder, alone):
    prompts, choices = others(5)
    with make_engine(folder, num_blocks=17, enable_prefix_caching=False) as engine:
        completions = engine.generate([*prompts, PROMPT], [*choices, CHOICES[name]])
        assert engine.scheduler.stats.preemptions > 0
    assert completions[-1].tokens == alone[name]


@pytest.mark.parametrize("known", [1, 7, 33])
@pytest.mark.parametrize("name", CHOICES)
def test_resubmitted_with_its_first_tokens_known(name, known, folder, alone):
    request = EngineRequest(request_id="resumed", prompt=PROMPT, generated=alone[name][:known], sampling=CHOICES[name])
    with make_engine(folder) as engine:
        (completion,) = engine.answer([request])
    assert alone[name][:known] + completion.tokens == alone[name]


def test_min_tokens_masks_the_stop_token_and_logit_bias_bans(folder, alone):
    tokens = alone["penalised"]
    assert 17 not in tokens[:20]
    assert 12 not in tokens


def test_logprobs_come_with_every_token_and_name_the_greedy_choice_first(folder):
    with make_engine(folder) as engine:
        (completion,) = engine.generate([PROMPT], SamplingParams(temperature=0, max_tokens=9, logprobs=3))
    assert len(completion.logprobs) == 9
    for token, entry in zip(completion.tokens, completion.logprobs, strict=True):
        assert entry.top[0] == (token, pytest.approx(entry.chosen))
        assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
        assert entry.chosen < 0
