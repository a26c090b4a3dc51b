"""The whole engine answers like transformers, whichever way its scheduler takes: every family, greedy, fp32."""

from __future__ import annotations

import pytest
from engine_references import LONGEST, NEW_TOKENS, FamilyReference, family_reference
from tiny_models import FAMILIES

from raytroupe.actors.local_engine import LocalEngine
from raytroupe.cluster.request import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request, tmp_path_factory) -> FamilyReference:
    root = tmp_path_factory.getbasetemp() / "families"
    return family_reference(request.param, root)


def make_engine(reference: FamilyReference, **fields) -> LocalEngine:
    defaults = {"dtype": "float32", "device": "cpu", "num_threads": 1, "block_size": 8, "max_model_len": 160}
    return LocalEngine(reference.folder, **(defaults | fields))


def answers_of(engine: LocalEngine, reference: FamilyReference) -> list[list[int]]:
    completions = engine.generate(reference.prompts, GREEDY)
    engine.scheduler.check_integrity()
    assert engine.scheduler.snapshot().blocks_held == 0
    return [completion.tokens for completion in completions]


def test_a_mixed_batch_gets_the_reference_answers_and_again_from_the_prefix_cache(reference):
    with make_engine(reference) as engine:
        assert answers_of(engine, reference) == reference.answers
        completions = engine.generate(reference.prompts, GREEDY)
        assert [completion.tokens for completion in completions] == reference.answers
        longest = max(completions, key=lambda completion: completion.cached_tokens)
        assert longest.cached_tokens == 56  # 64 prompt tokens, of which the last block must be computed


def test_chunked_prefill_gives_the_same_answers(reference):
    with make_engine(reference, max_num_seqs=4, max_num_batched_tokens=16, enable_prefix_caching=False) as engine:
        assert answers_of(engine, reference) == reference.answers


def test_preemption_by_a_tiny_pool_gives_the_same_answers(reference):
    blocks = -(-LONGEST // 8) + 6
    with make_engine(reference, num_blocks=1 + blocks, max_model_len=LONGEST) as engine:
        assert answers_of(engine, reference) == reference.answers
        assert engine.scheduler.stats.preemptions > 0
