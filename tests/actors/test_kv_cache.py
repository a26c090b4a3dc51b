"""A cache of 8 bits in the whole engine: its size, the same answers from all kernels, and close to those without it."""

import math

import pytest
import torch
from paged_batch import CPU, WAYS, DecoderDriver, random_sequences
from tiny_models import VOCAB_SIZE, make_tiny_model

from raytroupe.actors.kv_cache import KVCache
from raytroupe.actors.local_engine import LocalEngine
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.request import SamplingParams
from raytroupe.cluster.topology import ShardLayout, kv_bytes_per_block
from raytroupe.kernels.backend import CHOICE

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FAMILY = "gemma2"  # windows, soft caps and grouped heads

stored_types = pytest.mark.parametrize("stored", TYPES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(FAMILY, tmp_path_factory.mktemp(FAMILY))


@pytest.mark.parametrize("stored", [None, *TYPES.values()], ids=str)
@pytest.mark.parametrize("layout", [ShardLayout(), ShardLayout(tp_size=2, pp_size=2)], ids=str)
def test_a_cache_is_as_large_as_was_planned(folder, layout, stored):
    spec = load_spec(folder)
    cache = KVCache(spec, layout, 11, 8, stored or torch.float32, CPU)
    layers = [cache.layer(index) for index in range(len(layout.layers(spec)))]
    parts = [part for keys, values, scales in layers for part in (keys, values, *(scales or ()))]
    planned = kv_bytes_per_block(spec, layout, 8, 4, "auto" if stored is None else "int8")
    assert sum(part.nbytes for part in parts) == 11 * planned
    assert not any(part.float().any() for part in parts)


@stored_types
@pytest.mark.parametrize("way", WAYS[1:])
def test_compiled_kernels_and_their_program_give_the_references_logits(folder, way, stored):
    """Prompts, chunks and decode steps together."""
    sequences = random_sequences([40, 9, 70], VOCAB_SIZE)
    logits = []
    for each in ("torch", way):
        driver = DecoderDriver(folder, sequences, way=each, stored=TYPES[stored])
        for counts in ({0: 30}, {0: 1, 1: 5, 2: 50}, {0: 1, 1: 1, 2: 1}, {0: 8, 1: 1, 2: 18}, {1: 2}):
            driver.step(counts)
        logits.append([driver.all_logits(sequence) for sequence in range(3)])
    for expected, found in zip(*logits, strict=True):
        # A key that is rotated a little differently may be stored as the next number.
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * expected.std())


def answers(folder, prompts, sampling=GREEDY, times=2, **fields):
    """What a small engine says to all prompts, as often as it is asked."""
    limits = {"max_num_seqs": 8, "max_model_len": 64, "max_num_batched_tokens": 32}
    fixed = {"dtype": "float32", "device": "cpu", "num_threads": 1, "block_size": 4, "num_blocks": 60}
    with LocalEngine(folder, **fixed, **(limits | fields)) as engine:
        return [engine.generate(prompts, sampling) for _ in range(times)]


@stored_types
def test_greedy_tokens_are_those_of_the_reference_kernels_and_a_prefix_is_reused(folder, stored, monkeypatch):
    prompts = random_sequences([21, 5, 33], VOCAB_SIZE)
    found = []
    for choice in ("torch", ""):
        monkeypatch.setenv(CHOICE, choice)
        first, again = answers(folder, prompts, kv_cache_dtype=stored)
        assert [c.tokens for c in again] == [c.tokens for c in first]
        assert again[2].cached_tokens == 32
        found.append([c.tokens for c in first])
    assert found[0] == found[1]


@stored_types
def test_the_kernels_of_a_gpu_give_the_references_logits(folder, stored):
    """Prompts, a chunk and decode steps. The interpreter cuts off what does not fit fp8 where a GPU rounds."""
    sequences = random_sequences([9, 14], VOCAB_SIZE)
    logits = []
    for way in ("torch", "triton"):
        driver = DecoderDriver(folder, sequences, way=way, stored=TYPES[stored])
        for counts in ({0: 6}, {0: 1, 1: 12}, {0: 1, 1: 1}):
            driver.step(counts)
        logits.append(torch.cat([driver.all_logits(sequence) for sequence in range(2)]))
    difference = (logits[0] - logits[1]).std() / logits[0].std()
    assert difference < (1e-2 if stored == "int8" else 0.2)


def test_an_engine_with_the_kernels_of_a_gpu_gives_its_greedy_tokens(folder, monkeypatch):
    limits = {"max_num_seqs": 2, "max_model_len": 16, "max_num_batched_tokens": 16}
    prompts = random_sequences([7, 3], VOCAB_SIZE)
    found = []
    for choice in ("torch", "triton"):
        monkeypatch.setenv(CHOICE, choice)
        sampling = SamplingParams(temperature=0.0, max_tokens=3)
        completions = answers(folder, prompts, sampling, times=1, kv_cache_dtype="int8", **limits)[0]
        found.append([completion.tokens for completion in completions])
    assert found[0] == found[1]


def test_probabilities_are_close_to_those_of_an_exact_cache(folder):
    """int8 closer than fp8, which has 3 bits for the mantissa."""
    prompts = random_sequences([40, 25], VOCAB_SIZE)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20)
    errors = {}
    exact = answers(folder, prompts, sampling, enable_prefix_caching=False)[0]
    for stored in TYPES:
        rounded = answers(folder, prompts, sampling, enable_prefix_caching=False, kv_cache_dtype=stored)[0]
        differences = [abs(a - b) for a, b in zip(logprobs(exact), logprobs(rounded), strict=True)]
        errors[stored] = math.fsum(differences) / len(differences)
    assert 0 < errors["int8"] < errors["fp8"] < 0.2


def logprobs(completions):
    """Of the tokens that are likely, by their ids."""
    return [value for completion in completions for _, value in sorted(completion.logprobs[0].top)]


def test_8_bits_hold_almost_twice_as_many_blocks_as_16(folder):
    blocks = {}
    for stored in ("auto", "int8", "fp8"):
        with LocalEngine(
            folder, dtype="bfloat16", device="cpu", num_threads=1, kv_cache_memory="1MiB", max_model_len=64,
            max_num_seqs=4, kv_cache_dtype=stored,
        ) as engine:  # fmt: skip
            blocks[stored] = engine.memory.num_blocks
            assert ("KV cache: " if stored == "auto" else f"KV cache in {stored}: ") in engine.memory.reasoning
    head_dim = load_spec(folder).head_dim
    assert blocks["int8"] == blocks["fp8"]
    assert blocks["int8"] / blocks["auto"] == pytest.approx(2 * head_dim / (head_dim + 4), rel=1e-2)
