"""Tensor and pipeline parallelism do not change an answer: every family on 2 and 4 shard processes, fp32."""

from __future__ import annotations

import asyncio

import pytest
from engine_references import LONGEST, NEW_TOKENS, family_reference
from tiny_models import FAMILIES

from raytroupe.actors.local_engine import answer_all
from raytroupe.cluster.request import EngineRequest, SamplingParams
from raytroupe.cluster.scheduler import Scheduler
from raytroupe.cluster.scheduler_config import SchedulerConfig

BLOCK_SIZE = 8
BUDGET = 48


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_give_the_reference_answers(family, tp, pp, shard_processes, tmp_path_factory):
    reference = family_reference(family, tmp_path_factory.getbasetemp() / "families")
    # A pool that holds less than two of the longest requests, so that preemption meets parallelism too.
    num_blocks = 1 + 2 * -(-LONGEST // BLOCK_SIZE)
    answers, preemptions = answer(reference.folder, reference.prompts, NEW_TOKENS, tp, pp, num_blocks, shard_processes)
    assert answers == reference.answers
    assert preemptions > 0


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_shards_with_the_kernels_of_a_gpu_give_them_too(tp, pp, shard_processes, tmp_path_factory):
    """Steps are launched ahead, and tokens that other stages must know come back through the scheduler."""
    reference = family_reference("gemma2", tmp_path_factory.getbasetemp() / "families")
    prompts, tokens = reference.prompts[:3], 5
    answers, _ = answer(reference.folder, prompts, tokens, tp, pp, 60, shard_processes, kernels="triton")
    assert answers == [expected[:tokens] for expected in reference.answers[:3]]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_shards_with_a_cache_of_8_bits_answer_as_one_does(stored, tp, pp, shard_processes, tmp_path_factory):
    """A head has its scales wherever it is."""
    reference = family_reference("llama", tmp_path_factory.getbasetemp() / "families")
    answers = [
        answer(reference.folder, reference.prompts, 12, *size, 60, shard_processes, kv_cache_dtype=stored)[0]
        for size in ((1, 1), (tp, pp))
    ]
    assert answers[0] == answers[1]


def answer(folder, prompts, max_tokens, tp, pp, num_blocks, shard_processes, kernels="", kv_cache_dtype="auto"):
    """Greedy tokens of all prompts, and how often one was preempted."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=LONGEST,
            max_num_seqs=8,
            max_num_batched_tokens=BUDGET,
            pipeline_stages=pp,
        )
    )
    executor = shard_processes.executor(
        folder,
        tp,
        pp,
        num_blocks,
        kernels,
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        max_model_len=LONGEST,
        max_num_batched_tokens=BUDGET,
        kv_cache_dtype=kv_cache_dtype,
    )
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    requests = [
        EngineRequest(request_id=str(index), prompt=prompt, sampling=sampling) for index, prompt in enumerate(prompts)
    ]
    try:
        completions = asyncio.run(answer_all(scheduler, executor, requests))
    finally:
        executor.close()
    scheduler.check_integrity()
    assert scheduler.snapshot().blocks_held == 0
    return [completion.tokens for completion in completions], scheduler.stats.preemptions
