"""Attention, in torch and compiled, against attention written out for one query at a time."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import BlockTables

from raytroupe.kernels import attention_plan, native_library
from raytroupe.kernels.attention_plan import cut_into_buckets
from raytroupe.kernels.gpu.triton_kernels import TritonKernels
from raytroupe.kernels.native_kernels import NativeKernels
from raytroupe.kernels.paged_attention import store_kv
from raytroupe.kernels.torch_kernels import TorchKernels

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 6, 2, 10, 8
SCALE = 0.37


@pytest.fixture(params=["torch", "native", "triton"], autouse=True)
def kernels(request, monkeypatch):
    """Every test runs with all implementations."""
    if request.param == "torch":
        kernels = TorchKernels(torch.device("cpu"), torch.float32)
    elif request.param == "triton":
        kernels = TritonKernels(torch.device("cpu"), torch.float32)
    elif native_library.is_built():
        kernels = NativeKernels()
    else:
        pytest.skip("the kernels were not compiled: there was no C++ compiler at installation")
    monkeypatch.setattr(Sequences, "kernels", kernels)


class Sequences:
    """Random keys, values and queries for sequences of given lengths, cached in shuffled blocks."""

    kernels = None

    def __init__(self, lengths, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random_heads(heads):
            return [torch.randn(length, heads, HEAD_DIM, generator=generator) for length in lengths]

        self.keys, self.values, self.queries = random_heads(KV_HEADS), random_heads(KV_HEADS), random_heads(HEADS)
        self.blocks = BlockTables(BLOCK, 256)
        shape = (KV_HEADS, 256, BLOCK, HEAD_DIM)
        # Unused slots hold numbers that would show.
        self.k_cache, self.v_cache = torch.full(shape, 1e3), torch.full(shape, 1e3)

    def step(self, rows, window=None, softcap=None):
        metadata = self.blocks.metadata(rows)

        def gathered(tensors):
            return torch.cat([tensors[i][start : start + count] for i, start, count in rows])

        store_kv(gathered(self.keys), gathered(self.values), self.k_cache, self.v_cache, metadata.slot_mapping)
        plan = self.kernels.plan(metadata, BLOCK)
        query = gathered(self.queries)
        options = {"scale": SCALE, "window": window, "softcap": softcap}
        out = self.kernels.attention(query, self.k_cache, self.v_cache, plan, **options)
        assert out.shape == (len(query), HEADS * HEAD_DIM)
        return out.view(len(query), HEADS, HEAD_DIM)

    def expected(self, rows, window=None, softcap=None):
        return torch.cat(
            [self._one(i, position, window, softcap) for i, start, n in rows for position in range(start, start + n)]
        )

    def _one(self, sequence, position, window, softcap):
        first = 0 if window is None else max(0, position + 1 - window)
        heads = []
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            keys = self.keys[sequence][first : position + 1, kv].double()
            scores = keys @ self.queries[sequence][position, head].double() * SCALE
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            heads.append(torch.softmax(scores, 0) @ self.values[sequence][first : position + 1, kv].double())
        return torch.stack(heads)[None].float()


def assert_rows(sequences, rows, **options):
    torch.testing.assert_close(
        sequences.step(rows, **options), sequences.expected(rows, **options), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("window", [None, 1, 7, 8, 20, 1000])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_prompts_chunks_and_decode_rows(window, softcap):
    sequences = Sequences([50, 17, 33, 5])
    options = {"window": window, "softcap": softcap}
    assert_rows(sequences, [(0, 0, 50), (1, 0, 9), (2, 0, 32)], **options)
    assert_rows(sequences, [(2, 32, 1), (1, 9, 7), (3, 0, 4)], **options)
    assert_rows(sequences, [(1, 16, 1), (3, 4, 1)], **options)


def test_rows_of_very_different_length(monkeypatch):
    monkeypatch.setattr(attention_plan, "MAX_BUCKET_PADDING", 16)
    monkeypatch.setattr(attention_plan, "MAX_BUCKET_TOKENS", 128)
    lengths = [3, 90, 17, 64, 9, 65, 1, 40]
    sequences = Sequences(lengths)
    sequences.step([(i, 0, length - 1) for i, length in enumerate(lengths) if length > 2])
    assert_rows(sequences, [(i, length - 1, 1) for i, length in enumerate(lengths)])
    assert_rows(sequences, [(i, length - 1, 1) for i, length in enumerate(lengths)], window=20)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_long_prompt_is_computed_in_pieces(monkeypatch, softcap):
    monkeypatch.setattr(attention_plan, "MAX_MASK_ELEMENTS", 5000)
    sequences = Sequences([150])
    for window in (None, 20):
        assert_rows(sequences, [(0, 0, 150)], window=window, softcap=softcap)
        assert_rows(sequences, [(0, 70, 80)], window=window, softcap=softcap)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_breaks_one_row_reaches_neither_its_company_nor_the_next_owner_of_its_blocks(broken, softcap):
    sequences = Sequences([30, 31, 29])
    for tensors in (sequences.keys, sequences.values, sequences.queries):
        tensors[0].fill_(broken)
    sequences.step([(0, 0, 29), (1, 0, 30)], softcap=softcap)
    rows = [(0, 29, 1), (1, 30, 1)]
    expected = sequences.expected(rows[1:], softcap=softcap)
    torch.testing.assert_close(sequences.step(rows, softcap=softcap)[1:], expected, rtol=1e-5, atol=1e-5)
    sequences.blocks.tables.append(sequences.blocks.tables[0])
    assert_rows(sequences, [(2, 0, 9)], softcap=softcap)
    assert_rows(sequences, [(2, 9, 1), (1, 30, 1)], softcap=softcap)


@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_scores_far_apart_and_long_rows(window, softcap):
    sequences = Sequences([300, 299, 1])
    sequences.queries = [query * 40 for query in sequences.queries]
    sequences.step([(0, 0, 299), (1, 0, 298)])
    rows = [(0, 299, 1), (1, 298, 1), (2, 0, 1)]
    torch.testing.assert_close(
        sequences.step(rows, window=window, softcap=softcap),
        sequences.expected(rows, window=window, softcap=softcap),
        rtol=2e-5,
        atol=2e-5,
    )


def test_a_row_does_not_depend_on_its_company():
    lengths = [30, 31, 9, 77]
    together, alone = Sequences(lengths), Sequences(lengths)
    prompts = [(i, 0, length - 1) for i, length in enumerate(lengths)]
    together.step(prompts)
    company = together.step([(i, length - 1, 1) for i, length in enumerate(lengths)])
    for prompt in prompts:
        alone.step([prompt])
    for i, length in enumerate(lengths):
        torch.testing.assert_close(alone.step([(i, length - 1, 1)])[0], company[i], rtol=1e-6, atol=1e-6)


def test_bfloat16_rounds_once_per_product():
    sequences = Sequences([40])
    exact = sequences.expected([(0, 39, 1)])
    for name in ("keys", "values", "queries"):
        setattr(sequences, name, [t.bfloat16() for t in getattr(sequences, name)])
    sequences.k_cache, sequences.v_cache = sequences.k_cache.bfloat16(), sequences.v_cache.bfloat16()
    sequences.step([(0, 0, 39)])
    out = sequences.step([(0, 39, 1)])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.04)


@given(st.lists(st.integers(1, 300), max_size=60), st.sampled_from([4, 16, 64]))
@settings(max_examples=60, deadline=None)
def test_buckets_hold_every_row_once_within_bounds(lengths, block_size):
    buckets = cut_into_buckets(lengths, block_size)
    assert sorted(row for bucket in buckets for row in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        longest = max(lengths[row] for row in bucket)
        padding = sum(longest - lengths[row] for row in bucket) * block_size
        assert padding <= attention_plan.MAX_BUCKET_PADDING
        assert len(bucket) == 1 or longest * len(bucket) * block_size <= attention_plan.MAX_BUCKET_TOKENS
        assert bucket == sorted(bucket)


def test_rows_of_similar_length_share_a_bucket():
    rng = random.Random(1)
    lengths = [rng.randint(8, 10) for _ in range(32)]
    assert cut_into_buckets(lengths, 16) == [list(range(32))]
    assert cut_into_buckets([], 16) == []


def test_slots_that_are_not_mapped_keep_their_content():
    sequences = Sequences([3])
    sequences.step([(0, 0, 3)])
    written = (sequences.k_cache != 1e3).sum().item()
    assert written == 3 * KV_HEADS * HEAD_DIM
    assert math.isclose(sequences.k_cache.max().item(), 1e3)
