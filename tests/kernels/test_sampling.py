"""The batched sampler against a sampler written row by row in plain numpy, and its invariance under batching."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from raytroupe.kernels.logit_adjustments import LogitAdjustments, Penalties
from raytroupe.kernels.philox import uniforms
from raytroupe.kernels.sampling import SamplingBatch, sample

INT = np.int64


def make_batch(num_rows: int, **columns: object) -> SamplingBatch:
    """Greedy rows that ask for nothing, with the given columns (a list, or one value for all rows)."""
    defaults = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "uniform": 0.5, "logprobs": -1}
    values = {
        name: np.broadcast_to(
            np.asarray(columns.pop(name, default), INT if isinstance(default, int) else np.float64), (num_rows,)
        ).copy()
        for name, default in defaults.items()
    }
    return SamplingBatch(**values, adjustments=columns.pop("adjustments", None), **columns)


def adjustments(bias=(), masked=(), penalties=None) -> LogitAdjustments:
    """`bias` is (row, token, value)s, `masked` (row, token)s."""
    return LogitAdjustments(
        bias_rows=np.array([b[0] for b in bias], INT),
        bias_tokens=np.array([b[1] for b in bias], INT),
        bias_values=np.array([b[2] for b in bias], np.float32),
        masked_rows=np.array([m[0] for m in masked], INT),
        masked_tokens=np.array([m[1] for m in masked], INT),
        penalties=penalties,
    )


def distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The probabilities that a row should be drawn from, in float64."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    if top_k > 0:
        probabilities[order[top_k:]] = 0.0
        probabilities /= probabilities.sum()
    if top_p < 1.0:
        size = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
        probabilities[order[size:]] = 0.0
    probabilities[probabilities < min_p * probabilities.max()] = 0.0
    return probabilities / probabilities.sum()


def test_greedy_takes_the_largest_logit_and_the_lower_id_on_a_tie():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0], [-1.0, -2.0, -3.0, -0.5]])
    assert sample(logits.clone(), make_batch(3)).tokens == [1, 0, 3]
    assert sample(logits, make_batch(3, temperature=1e-9)).tokens == [1, 0, 3]


@pytest.mark.parametrize("vocab_size", [5, 700, 5003])
def test_draws_follow_the_inverse_cdf_of_the_filtered_distribution(vocab_size):
    rng = np.random.default_rng(vocab_size)
    rows = 400
    logits = rng.normal(0, 3, (rows, vocab_size)).astype(np.float32)
    temperature = rng.choice([0.3, 0.8, 1.0, 2.0, 10.0], rows)
    top_k = rng.choice([0, 0, 1, 3, 50, vocab_size, vocab_size + 7], rows)
    top_p = rng.choice([1.0, 1.0, 0.05, 0.5, 0.9, 0.999], rows)
    min_p = rng.choice([0.0, 0.0, 0.01, 0.2, 1.0], rows)
    uniform = rng.random(rows)
    batch = make_batch(rows, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform)
    tokens = sample(torch.from_numpy(logits.copy()), batch).tokens
    for row, token in enumerate(tokens):
        expected = distribution(logits[row], temperature[row], top_k[row], top_p[row], min_p[row])
        cdf = np.cumsum(expected)
        assert expected[token] > 0.0
        # u lies in the token's interval, but for the rounding of float32 exponentials
        assert cdf[token] - expected[token] - 1e-5 <= uniform[row] <= cdf[token] + 1e-5


def test_drawn_tokens_have_the_frequencies_of_the_distribution():
    draws = 20_000
    logits = torch.tensor([[1.0, -1.0, 0.5, 2.0, -30.0, 0.0]]).repeat(draws, 1)
    uniform = uniforms(np.full(draws, 7, np.uint64), np.arange(draws))
    tokens = sample(logits.clone(), make_batch(draws, temperature=0.9, uniform=uniform)).tokens
    expected = distribution(logits[0].numpy(), 0.9, 0, 1.0, 0.0) * draws
    counts = np.bincount(tokens, minlength=6)
    assert counts[4] == 0
    chi_square = float(((counts - expected) ** 2 / expected.clip(1e-3)).sum())
    assert chi_square < 20  # 4 degrees of freedom; the inputs are fixed


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_extreme_uniform_numbers_give_tokens_of_positive_probability(uniform):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]])
    for filters in ({}, {"top_k": 4}, {"top_p": 0.99}, {"min_p": 0.1}):
        token = sample(logits.clone(), make_batch(1, temperature=1.0, uniform=uniform, **filters)).tokens[0]
        assert token == (1 if uniform == 0.0 else 3)


def test_ties_at_the_border_of_top_k_and_top_p_keep_the_lower_ids():
    logits = torch.zeros(200, 1000)
    uniform = (np.arange(200) + 0.5) / 200
    top_k = sample(logits.clone(), make_batch(200, temperature=1.0, top_k=4, uniform=uniform)).tokens
    assert sorted(set(top_k)) == [0, 1, 2, 3]
    top_p = sample(logits.clone(), make_batch(200, temperature=1.0, top_p=0.0035, uniform=uniform)).tokens
    assert sorted(set(top_p)) == [0, 1, 2, 3]


def mixed_batch(rows: int, vocab_size: int, seed: int) -> tuple[torch.Tensor, SamplingBatch]:
    """Rows of every kind, with penalties, bias, masks and log-probabilities on some of them."""
    rng = np.random.default_rng(seed)
    # Few distinct values, so that ties are everywhere.
    logits = torch.from_numpy(np.round(rng.normal(0, 2, (rows, vocab_size)), 1).astype(np.float32))
    penalised = np.sort(rng.choice(rows, rows // 3, replace=False))
    penalties = Penalties(
        rows=penalised,
        tokens=rng.integers(0, vocab_size, (len(penalised), 40), dtype=np.int32),
        lengths=rng.integers(1, 41, len(penalised)),
        prompt_lens=rng.integers(1, 20, len(penalised)),
        repetition=rng.choice([1.0, 1.3], len(penalised)).astype(np.float32),
        presence=rng.choice([0.0, 0.5], len(penalised)).astype(np.float32),
        frequency=rng.choice([0.0, 0.25], len(penalised)).astype(np.float32),
    )
    bias = [(row, int(rng.integers(vocab_size)), float(rng.normal(0, 5))) for row in range(0, rows, 3)]
    masked = [(row, int(rng.integers(vocab_size))) for row in range(0, rows, 4)]
    batch = make_batch(
        rows,
        temperature=rng.choice([0.0, 0.7, 1.0, 5.0], rows),
        top_k=rng.choice([0, 0, 5, 300], rows),
        top_p=rng.choice([1.0, 0.9, 0.3], rows),
        min_p=rng.choice([0.0, 0.05], rows),
        uniform=rng.random(rows),
        logprobs=rng.choice([-1, 0, 3, 7], rows),
        adjustments=adjustments(bias, masked, penalties),
    )
    return logits, batch


def take_rows(batch: SamplingBatch, rows: np.ndarray) -> SamplingBatch:
    """The batch that holds the given rows in the given order."""
    columns = {
        field.name: getattr(batch, field.name)[rows]
        for field in dataclasses.fields(batch)
        if field.name != "adjustments"
    }
    whole = batch.adjustments
    new_row = {int(row): i for i, row in enumerate(rows)}
    pick = np.array([i for i, row in enumerate(whole.penalties.rows.tolist()) if row in new_row], INT)
    penalties = None
    if pick.size:
        lengths = whole.penalties.lengths[pick]
        penalties = Penalties(
            rows=np.array([new_row[int(row)] for row in whole.penalties.rows[pick]], INT),
            tokens=whole.penalties.tokens[pick][:, : lengths.max()].copy(),
            lengths=lengths,
            **{
                name: getattr(whole.penalties, name)[pick]
                for name in ("prompt_lens", "repetition", "presence", "frequency")
            },
        )
    bias = zip(whole.bias_rows.tolist(), whole.bias_tokens.tolist(), whole.bias_values.tolist(), strict=True)
    masked = zip(whole.masked_rows.tolist(), whole.masked_tokens.tolist(), strict=True)
    return SamplingBatch(
        **columns,
        adjustments=adjustments(
            [(new_row[row], token, value) for row, token, value in bias if row in new_row],
            [(new_row[row], token) for row, token in masked if row in new_row],
            penalties,
        ),
    )


@pytest.mark.parametrize("vocab_size", [37, 1021])
def test_a_row_gives_the_same_bits_alone_and_in_any_batch(vocab_size):
    logits, batch = mixed_batch(48, vocab_size, seed=vocab_size)
    together = sample(logits.clone(), batch)
    groupings = [np.array([row]) for row in range(48)]
    groupings += np.array_split(np.random.default_rng(1).permutation(48), 5)
    for rows in groupings:
        apart = sample(logits[torch.from_numpy(rows)], take_rows(batch, rows))
        assert apart.tokens == [together.tokens[row] for row in rows]
        if apart.logprobs is not None:
            assert apart.logprobs == [together.logprobs[row] for row in rows]


def test_penalties_count_prompt_and_output_as_defined():
    vocab_size, rng = 30, np.random.default_rng(3)
    logits = rng.normal(0, 2, (4, vocab_size)).astype(np.float32)
    tokens = rng.integers(0, vocab_size, (3, 25), dtype=np.int32)
    lengths, prompt_lens = np.array([25, 10, 1]), np.array([8, 10, 1])
    repetition = np.array([1.5, 0.5, 2.0], np.float32)
    presence = np.array([0.25, 1.0, 0.5], np.float32)
    frequency = np.array([0.5, 0.125, 0.0], np.float32)
    rows = np.array([0, 2, 3])

    expected = logits.copy()
    for i, row in enumerate(rows):
        sequence = tokens[i, : lengths[i]].tolist()
        output = sequence[prompt_lens[i] :]
        for token in set(sequence):
            value = expected[row, token]
            value = value / repetition[i] if value > 0 else value * repetition[i]
            expected[row, token] = value - output.count(token) * frequency[i] - (token in output) * presence[i]

    adjusted = torch.from_numpy(logits.copy())
    penalties = Penalties(rows, tokens, lengths, prompt_lens, repetition, presence, frequency)
    adjustments(penalties=penalties).apply_(adjusted)
    np.testing.assert_allclose(adjusted.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(adjusted[1].numpy(), logits[1])


def test_bias_and_masks_decide_the_token_and_leave_log_probabilities_alone():
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    edits = adjustments(bias=[(0, 0, 5.0)], masked=[(1, 2)])
    result = sample(logits.clone(), make_batch(3, logprobs=[1, 2, -1], adjustments=edits))
    assert result.tokens == [0, 1, 2]
    raw = logits[0].log_softmax(0).tolist()
    assert result.logprobs == [
        (pytest.approx(raw[0]), [(2, pytest.approx(raw[2]))]),
        (pytest.approx(raw[1]), [(2, pytest.approx(raw[2])), (1, pytest.approx(raw[1]))]),
        None,
    ]


def test_reported_alternatives_are_ordered_by_probability_and_then_by_id():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]])
    chosen, top = sample(logits, make_batch(1, logprobs=99)).logprobs[0]
    assert [token for token, _ in top] == [1, 3, 0, 2, 4]
    assert chosen == top[0][1]
    assert sum(math.exp(value) for _, value in top) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "values",
    [
        [math.nan] * 4,
        [math.nan, 1.0, 2.0, math.inf],
        [-math.inf] * 4,
        [math.inf] * 4,
        [math.inf, -math.inf, 3.4e38, -3.4e38],
    ],
)
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_p": math.nan}])
@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1.0, 1e300, math.inf, math.nan])
def test_invalid_numbers_give_a_valid_token_and_finite_log_probabilities(values, filters, temperature):
    batch = make_batch(2, temperature=temperature, uniform=[0.0, 0.999], logprobs=4, **filters)
    result = sample(torch.tensor([values, [1.0, 2.0, 3.0, 4.0]]), batch)
    assert all(0 <= token < 4 for token in result.tokens)
    for chosen, top in result.logprobs:
        assert math.isfinite(chosen)
        assert all(math.isfinite(value) for _, value in top)
