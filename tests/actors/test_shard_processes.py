"""Tensor- and pipeline-parallel shards in separate processes give the tokens of one shard."""

import asyncio

import pytest
from plan_builder import PlanBuilder
from tiny_models import VOCAB_SIZE, make_tiny_model

from raytroupe.actors.executor import LocalExecutor
from raytroupe.actors.shard import Shard
from raytroupe.actors.shard_config import ShardConfig
from raytroupe.cluster.errors import CheckpointError, ShardFailed
from raytroupe.cluster.request import SamplingParams

NUM_BLOCKS, BLOCK_SIZE = 24, 8
LIMITS = {"block_size": BLOCK_SIZE, "max_num_seqs": 4, "max_model_len": 96, "max_num_batched_tokens": 64}
GREEDY = SamplingParams(temperature=0.0, logprobs=2)
RANDOM = SamplingParams(temperature=0.9, seed=2**63 + 5)
FILTERED = SamplingParams(
    temperature=1.2,
    top_k=20,
    top_p=0.9,
    min_p=0.01,
    seed=3,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.1,
    logit_bias={7: 2.0},
    min_tokens=4,
    stop_token_ids=(2,),
    logprobs=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"))


def prompt(length: int, seed: int) -> list[int]:
    return [(seed * 31 + 17 * i + i * i) % VOCAB_SIZE for i in range(length)]


def steps(builder: PlanBuilder):
    """Chunked prefill beside decode steps, a slot and its blocks that change owner, a resumed sequence."""
    builder.add(0, prompt(37, 1), GREEDY)
    builder.add(2, prompt(9, 2), RANDOM)
    yield {0: 20, 2: 9}
    yield {0: 17, 2: 1}
    builder.add(1, prompt(25, 3), FILTERED)
    yield {0: 1, 1: 25, 2: 1}
    for _ in range(10):
        yield {2: 1, 0: 1, 1: 1}
    builder.add(0, prompt(50, 4), RANDOM)
    yield {0: 33, 1: 1}
    yield {0: 17, 1: 1, 2: 1}
    builder.add(3, prompt(12, 5), FILTERED, prompt_len=8)
    yield {3: 11}
    yield {3: 1, 2: 1}
    for _ in range(8):
        yield {0: 1, 1: 1, 2: 1, 3: 1}


async def run(executor, *, self_feeding: bool):
    """All sampled tokens and log-probabilities, step by step."""
    builder = PlanBuilder(BLOCK_SIZE, NUM_BLOCKS, self_feeding=self_feeding)
    results, plans = [], []
    try:
        for counts in steps(builder):
            plan = builder.step(counts)
            executor.submit(plan)
            plans.append(plan)
            if not self_feeding or len(plans) == 2:  # two plans in flight
                plan = plans.pop(0)
                results.append(await executor.result())
                builder.take(plan, results[-1])
        for plan in plans:
            results.append(await executor.result())
            builder.take(plan, results[-1])
    finally:
        executor.close()
    return [(result.tokens, result.logprobs) for result in results]


@pytest.fixture(scope="module")
def expected(folder):
    shard = Shard(ShardConfig(folder=folder, dtype="float32", device="cpu", num_threads=1, **LIMITS))
    shard.connect()
    shard.load()
    shard.allocate(NUM_BLOCKS)
    return asyncio.run(run(LocalExecutor(shard.run), self_feeding=True))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
async def test_parallel_shards_give_the_tokens_of_one_shard(folder, expected, shard_processes, tp, pp):
    executor = shard_processes.executor(folder, tp, pp, NUM_BLOCKS, **LIMITS)
    results = await run(executor, self_feeding=pp == 1)
    assert [tokens for tokens, _ in results] == [tokens for tokens, _ in expected]
    for (_, logprobs), (_, expected_logprobs) in zip(results, expected, strict=True):
        for entry, expected_entry in zip(logprobs or [], expected_logprobs or [], strict=True):
            assert (entry is None) == (expected_entry is None)
            if entry is not None:
                assert entry.chosen == pytest.approx(expected_entry.chosen, abs=1e-4)
                assert [token for token, _ in entry.top] == [token for token, _ in expected_entry.top]


async def test_a_failing_shard_surfaces_and_the_processes_serve_the_next_replica(
    folder, expected, shard_processes, tmp_path
):
    executor = shard_processes.executor(folder, 2, 1, NUM_BLOCKS, **LIMITS)
    builder = PlanBuilder(BLOCK_SIZE, 1000, self_feeding=True)
    builder.add(LIMITS["max_num_seqs"], prompt(8, 1), GREEDY)  # a slot that does not exist
    executor.submit(builder.step({LIMITS["max_num_seqs"]: 8}))
    with pytest.raises(ShardFailed, match="IndexError"):
        await executor.result()
    executor.close()

    with pytest.raises(ShardFailed, match=CheckpointError.__name__):
        shard_processes.executor(tmp_path / "nowhere", 2, 2, NUM_BLOCKS, **LIMITS)

    executor = shard_processes.executor(folder, 2, 1, NUM_BLOCKS, **LIMITS)
    assert [tokens for tokens, _ in await run(executor, self_feeding=True)] == [tokens for tokens, _ in expected]
