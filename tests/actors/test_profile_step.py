"""The largest step has as much of everything as a step may have, and a cache of one block runs it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, make_tiny_model

from raytroupe.actors.profile_step import largest_step
from raytroupe.actors.shard import Shard
from raytroupe.actors.shard_config import ShardConfig
from raytroupe.cluster.step import NULL_BLOCK


def test_one_long_prompt_beside_rows_of_one_token() -> None:
    plan = largest_step(max_num_seqs=64, max_num_batched_tokens=1024, max_model_len=2048, block_size=16, vocab_size=99)
    assert plan.counts == [1] * 63 + [961]
    assert plan.starts == [2046] + [0] * 63
    assert plan.decode_rows == 63
    assert plan.new_blocks[0] == (0, [NULL_BLOCK] * 128)
    assert plan.new_blocks[63] == (63, [NULL_BLOCK] * 61)


def test_a_single_sequence_computes_the_end_of_its_context() -> None:
    plan = largest_step(max_num_seqs=1, max_num_batched_tokens=512, max_model_len=4096, block_size=16, vocab_size=99)
    assert (plan.starts, plan.counts, plan.decode_rows) == ([3583], [512], 0)
    assert len(plan.new[0].tokens) == 4095


@given(
    max_num_seqs=st.integers(1, 40),
    more_tokens=st.integers(0, 300),
    max_model_len=st.integers(2, 200),
    block_size=st.sampled_from([4, 16]),
)
def test_it_is_a_valid_plan_of_the_largest_size(max_num_seqs, more_tokens, max_model_len, block_size) -> None:
    budget = max_num_seqs + more_tokens
    plan = largest_step(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        block_size=block_size,
        vocab_size=99,
    )
    lengths = [start + count for start, count in zip(plan.starts, plan.counts, strict=True)]
    assert len(plan.slots) == max_num_seqs
    assert all(plan.samples)
    assert sum(plan.counts) == min(budget, max_num_seqs * (max_model_len - 1))
    assert max(lengths) == max_model_len - 1
    assert plan.counts == sorted(plan.counts)
    assert all(count == 1 for count in plan.counts[: plan.decode_rows])
    assert all(count > 1 for count in plan.counts[plan.decode_rows :])
    assert [len(sequence.tokens) for sequence in plan.new] == lengths
    assert [len(blocks) for _, blocks in plan.new_blocks] == [-(-length // block_size) for length in lengths]


@pytest.mark.parametrize("max_num_seqs", [1, 8])
def test_a_shard_with_one_block_runs_it_and_reports_every_row(tmp_path, max_num_seqs) -> None:
    folder = make_tiny_model("llama", tmp_path)
    config = ShardConfig(
        folder=folder,
        dtype="float32",
        device="cpu",
        block_size=8,
        max_num_seqs=max_num_seqs,
        max_model_len=48,
        max_num_batched_tokens=64,
    )
    shard = Shard(config)
    shard.connect()
    shard.load()
    shard.allocate(1)
    result = shard.run(
        largest_step(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=64,
            max_model_len=48,
            block_size=8,
            vocab_size=VOCAB_SIZE,
        )
    )
    assert result is not None
    assert len(result.tokens) == max_num_seqs
    assert all(0 < token < VOCAB_SIZE for token in result.tokens)  # 0 is masked: the stop token before min_tokens
    assert result.logprobs is not None
    assert [len(entry.top) for entry in result.logprobs] == [20] * max_num_seqs
    assert torch.isfinite(torch.tensor([entry.chosen for entry in result.logprobs])).all()
    shard.close()
