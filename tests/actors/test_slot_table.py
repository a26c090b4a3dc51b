"""The slot table and the inputs built from it, against loops over every token."""

import numpy as np
import pytest
import torch

from raytroupe.actors.slot_table import SlotTable
from raytroupe.actors.step_inputs import StepInputs
from raytroupe.cluster.request import SamplingParams
from raytroupe.cluster.step import NULL_BLOCK, NewSequence, StepPlan
from raytroupe.kernels.philox import uniforms
from raytroupe.kernels.sampling import sample

BLOCK_SIZE, MAX_LEN, SLOTS, VOCAB = 4, 64, 8, 100
GREEDY = SamplingParams(temperature=0.0)


def make_plan(rows=(), new=(), new_blocks=(), new_tokens=()) -> StepPlan:
    """`rows` are (slot, start, count, samples)."""
    slots, starts, counts, samples = ([row[i] for row in rows] for i in range(4))
    decode_rows = next((i for i, count in enumerate(counts) if count != 1), len(counts))
    return StepPlan(0, list(new), slots, starts, counts, samples, decode_rows, list(new_blocks), list(new_tokens))


@pytest.fixture
def table():
    return SlotTable(SLOTS, MAX_LEN, BLOCK_SIZE, VOCAB)


def test_a_new_sequence_overwrites_its_slot_and_blocks_are_appended(table):
    table.apply(make_plan(new=[NewSequence(3, list(range(10, 30)), 20, GREEDY)], new_blocks=[(3, [7, 8, 9, 1, 2])]))
    table.apply(make_plan(new_blocks=[(3, [5])]))
    assert table.block_tables[3].tolist() == [7, 8, 9, 1, 2, 5] + [NULL_BLOCK] * 10
    table.apply(make_plan(new=[NewSequence(3, [1, 2, 3], 2, GREEDY)], new_blocks=[(3, [4])]))
    assert table.block_tables[3].tolist() == [4] + [NULL_BLOCK] * 15
    assert table.tokens[3, :3].tolist() == [1, 2, 3]


def test_sampled_and_sent_tokens_land_behind_the_sequence(table):
    table.apply(make_plan(new=[NewSequence(s, [s] * 4, 4, GREEDY) for s in range(3)]))
    table.record(np.array([2, 0]), np.array([4, 4]), [50, 60])
    table.apply(make_plan(new_tokens=[(1, 4, [70, 71])]))
    assert table.tokens[:3, :6].tolist() == [[0, 0, 0, 0, 60, 0], [1, 1, 1, 1, 70, 71], [2, 2, 2, 2, 50, 0]]


def test_token_ids_outside_of_the_vocabulary_cannot_reach_the_embedding(table):
    table.apply(make_plan(new=[NewSequence(0, [-5, VOCAB, 10**30, 7], 4, GREEDY)]))
    assert table.tokens[0, :4].tolist() == [0, VOCAB - 1, VOCAB - 1, 7]


def test_inputs_of_a_random_mixed_step_match_a_loop_over_tokens(table):
    rng = np.random.default_rng(0)
    inputs = StepInputs(table, block_size=BLOCK_SIZE, max_num_batched_tokens=256, device=torch.device("cpu"))
    for trial in range(50):
        num_rows = int(rng.integers(1, SLOTS + 1))
        slots = rng.permutation(SLOTS)[:num_rows].tolist()
        lengths = rng.integers(1, MAX_LEN + 1, num_rows).tolist()
        decode_rows = int(rng.integers(0, num_rows + 1))
        counts = [1 if i < decode_rows else int(rng.integers(1, n + 1)) for i, n in enumerate(lengths)]
        samples = [bool(flag) for flag in rng.integers(0, 2, num_rows)]
        sequences = {slot: rng.integers(0, VOCAB, n).tolist() for slot, n in zip(slots, lengths, strict=True)}
        blocks = {
            slot: rng.integers(1, 99, -(-n // BLOCK_SIZE)).tolist() for slot, n in zip(slots, lengths, strict=True)
        }
        starts = [n - c for n, c in zip(lengths, counts, strict=True)]
        plan = StepPlan(
            step=trial,
            new=[NewSequence(slot, tokens, len(tokens), GREEDY) for slot, tokens in sequences.items()],
            slots=slots,
            starts=starts,
            counts=counts,
            samples=samples,
            decode_rows=decode_rows,
            new_blocks=list(blocks.items()),
            new_tokens=[],
        )
        table.apply(plan)
        step = inputs.build(plan)
        rows = list(zip(slots, starts, counts, strict=True))
        positions = [(slot, p) for slot, start, count in rows for p in range(start, start + count)]
        meta = step.metadata
        assert step.tokens.tolist() == [sequences[slot][p] for slot, p in positions]
        assert meta.positions.tolist() == [p for _, p in positions]
        assert meta.slot_mapping.tolist() == [
            blocks[slot][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for slot, p in positions
        ]
        assert meta.query_start.tolist() == [0, *np.cumsum(counts).tolist()]
        assert meta.context_lens.tolist() == meta.contexts == lengths
        assert meta.counts == counts
        assert meta.decode_rows == decode_rows
        width = max(len(table) for table in blocks.values())
        assert meta.block_tables.tolist() == [blocks[s] + [NULL_BLOCK] * (width - len(blocks[s])) for s in slots]
        sampled = [i for i, flag in enumerate(samples) if flag]
        assert step.sampled.last_tokens.tolist() == [sum(counts[: i + 1]) - 1 for i in sampled]
        assert step.sampled.slots.tolist() == [slots[i] for i in sampled]
        assert step.sampled.lengths.tolist() == [lengths[i] for i in sampled]
        assert meta.positions.dtype == meta.slot_mapping.dtype == step.tokens.dtype == torch.int64
        assert meta.query_start.dtype == meta.context_lens.dtype == meta.block_tables.dtype == torch.int32


def test_rows_that_ask_for_nothing_need_no_sampling_batch(table):
    table.apply(make_plan(new=[NewSequence(s, [1], 1, GREEDY) for s in range(SLOTS)]))
    assert table.sampling.batch(np.arange(SLOTS), np.ones(SLOTS, np.int64), table.tokens) is None


def test_sampling_parameters_reach_their_rows(table):
    rich = SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=2**64 - 1,
        logprobs=3,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={5: 2.0, VOCAB: 1.0, -1: 1.0, 6: -1e300},
        min_tokens=3,
        stop_token_ids=(9, VOCAB, -7, 8),
    )
    table.apply(make_plan(new=[NewSequence(1, [1, 2, 3, 4, 5], 4, rich), NewSequence(6, [9, 9], 2, GREEDY)]))
    batch = table.sampling.batch(np.array([6, 1]), np.array([2, 5]), table.tokens)
    assert batch.temperature.tolist() == [0.0, 0.5]
    assert batch.top_p.tolist() == [1.0, 0.9]
    assert batch.top_k.tolist() == [0, 7]
    assert batch.min_p.tolist() == [0.0, 0.1]
    assert batch.logprobs.tolist() == [-1, 3]
    assert batch.uniform[1] == uniforms(np.array([2**64 - 1], np.uint64), np.array([5]))[0]
    edits = batch.adjustments
    assert edits.bias_rows.tolist() == [1, 1]
    assert edits.bias_tokens.tolist() == [5, 6]
    assert edits.bias_values.tolist() == [2.0, float(np.finfo(np.float32).min)]
    assert edits.masked_rows.tolist() == [1, 1]
    assert edits.masked_tokens.tolist() == [9, 8]
    assert edits.penalties.rows.tolist() == [1]
    assert edits.penalties.tokens.tolist() == [[1, 2, 3, 4, 5]]
    assert edits.penalties.lengths.tolist() == [5]
    assert edits.penalties.prompt_lens.tolist() == [4]
    assert [edits.penalties.repetition[0], edits.penalties.presence[0], edits.penalties.frequency[0]] == [
        1.5,
        0.25,
        -0.5,
    ]
    # One token is generated at length 5, so the third is the last to be masked.
    assert table.sampling.batch(np.array([1]), np.array([6]), table.tokens).adjustments.masked_tokens.size == 2
    assert table.sampling.batch(np.array([1]), np.array([7]), table.tokens).adjustments.masked_tokens.size == 0


@pytest.mark.parametrize(
    "params",
    [
        {"seed": -1},
        {"seed": 2**80},
        {"top_k": 2**70},
        {"top_k": -3, "temperature": float("nan")},
        {"temperature": float("inf"), "top_p": float("nan"), "min_p": float("inf")},
        {"logprobs": 10**9},
        {"min_tokens": 2**70, "stop_token_ids": tuple(range(VOCAB))},
        {"repetition_penalty": 0.0, "presence_penalty": 1e300, "frequency_penalty": float("inf")},
        {"logit_bias": {3: float("nan"), 4: float("inf")}},
    ],
)
def test_absurd_parameters_give_a_valid_token(table, params):
    table.apply(make_plan(new=[NewSequence(0, [1, 2, 3], 2, SamplingParams(**params))]))
    batch = table.sampling.batch(np.array([0]), np.array([3]), table.tokens)
    result = sample(torch.randn(1, VOCAB), batch)
    assert 0 <= result.tokens[0] < VOCAB


def test_clear_leaves_no_trace(table):
    table.apply(make_plan(new=[NewSequence(2, [1, 2], 2, SamplingParams())], new_blocks=[(2, [3])]))
    table.clear()
    assert not table.tokens.any()
    assert not table.block_tables.any()
    assert not any(table.num_blocks)
