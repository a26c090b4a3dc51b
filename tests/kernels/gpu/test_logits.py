"""Adjusted logits on the device against the host's: equal to the bit."""

import numpy as np
import pytest
import torch

from raytroupe.kernels.gpu.logits import adjust_, adjustment_arrays
from raytroupe.kernels.gpu.sampling_batch import DeviceBatch, PenalisedRows
from raytroupe.kernels.logit_adjustments import LogitAdjustments, Penalties
from raytroupe.kernels.uploads import Uploads

CPU = torch.device("cpu")
NONE = np.zeros(0, dtype=np.int64)


def make_batch(bias=(), masked=(), penalties: PenalisedRows | None = None) -> DeviceBatch:
    """`bias` is (row, token, value)s, `masked` (row, token)s; nothing else of the batch is read."""
    return DeviceBatch(
        *[NONE] * 7,
        bias_rows=np.array([b[0] for b in bias], np.int64),
        bias_tokens=np.array([b[1] for b in bias], np.int64),
        bias_values=np.array([b[2] for b in bias], np.float32),
        masked_rows=np.array([m[0] for m in masked], np.int64),
        masked_tokens=np.array([m[1] for m in masked], np.int64),
        penalties=penalties,
    )


def penalised_rows(rng: np.random.Generator, rows: list[int], slots: list[int], lengths: list[int]) -> PenalisedRows:
    def any_of(*values: float) -> np.ndarray:
        return rng.choice(values, len(rows)).astype(np.float32)

    return PenalisedRows(
        rows=np.array(rows),
        slots=np.array(slots),
        lengths=np.array(lengths),
        prompt_lens=rng.integers(1, np.array(lengths) + 1),
        repetition=any_of(1.0, 1.3, 0.7),
        presence=any_of(0.0, 0.4, -0.3),
        frequency=any_of(0.0, 0.15, -0.1),
    )


def reference_(logits: torch.Tensor, batch: DeviceBatch, tokens: torch.Tensor) -> torch.Tensor:
    rows = batch.penalties
    penalties = rows and Penalties(
        rows.rows, tokens.numpy()[rows.slots], rows.lengths, rows.prompt_lens, rows.repetition, rows.presence,
        rows.frequency,
    )  # fmt: skip
    LogitAdjustments(
        batch.bias_rows, batch.bias_tokens, batch.bias_values, batch.masked_rows, batch.masked_tokens, penalties
    ).apply_(logits)
    return logits


def check(logits: torch.Tensor, batch: DeviceBatch, tokens: torch.Tensor) -> torch.Tensor:
    """Adjust in rows that are parts of longer ones; return them."""
    expected = reference_(logits.clone(), batch, tokens)
    padded = torch.full((len(logits), logits.shape[1] + 3), 7.0)
    adjusted = padded[:, : logits.shape[1]].copy_(logits)
    adjust_(adjusted, Uploads(CPU)(adjustment_arrays(batch)), tokens)
    assert torch.equal(adjusted.view(torch.int32), expected.view(torch.int32))
    assert (padded[:, logits.shape[1] :] == 7.0).all()
    return adjusted


@pytest.mark.launches("edit_logits_kernel", "count_tokens_kernel", "penalise_kernel")
@pytest.mark.parametrize("vocab_size", [5, 257, 1000])
def test_adjustments_are_those_of_the_host(vocab_size, generator):
    rng = np.random.default_rng(generator.initial_seed())
    tokens = torch.from_numpy(rng.integers(0, vocab_size, (6, 81), dtype=np.int32))
    # Few values, zero among them, so that every branch meets ties and signs.
    logits = torch.from_numpy((rng.integers(-9, 10, (5, vocab_size)) * 0.37).astype(np.float32))
    places = rng.choice(5 * vocab_size, 9, replace=False)
    bias = [(place // vocab_size, place % vocab_size, rng.normal(0, 5)) for place in places]
    # The masks hit biased places, others, and one twice.
    masked = [(place // vocab_size, place % vocab_size) for place in places[:3]] + [(4, 1), (4, 1), (0, 2)]
    check(logits, make_batch(bias, masked, penalised_rows(rng, [0, 1, 4], [5, 0, 3], [80, 1, 33])), tokens)


@pytest.mark.launches("edit_logits_kernel")
@pytest.mark.filterwarnings("ignore:invalid value encountered in add")
@pytest.mark.parametrize("what", ["bias", "masked"])
def test_bias_and_masks_alone(what):
    logits = torch.tensor([[1.0, torch.nan, torch.inf, -2.0]])
    if what == "bias":
        adjusted = check(logits, make_batch(bias=[(0, 0, 2.5), (0, 2, -1.0)]), torch.zeros(1, 1, dtype=torch.int32))
        assert adjusted[0, 0] == 3.5
    else:
        adjusted = check(logits, make_batch(masked=[(0, 1), (0, 2)]), torch.zeros(1, 1, dtype=torch.int32))
        assert (adjusted[0, 1:3] == -torch.inf).all()


@pytest.mark.launches("count_tokens_kernel", "penalise_kernel")
def test_long_sequences_and_repeated_tokens_are_counted_once_per_occurrence():
    """More tokens than one round of all programs of a row takes, half of them one token."""
    rng = np.random.default_rng(3)
    tokens = torch.from_numpy(rng.integers(0, 50, (2, 17_000), dtype=np.int32))
    tokens[:, ::2] = 17
    logits = torch.from_numpy(rng.normal(0, 3, (2, 50)).astype(np.float32))
    rows = penalised_rows(rng, [1], [1], [16_999])
    rows.prompt_lens[:] = 100
    rows.frequency[:], rows.presence[:] = 0.25, 0.5
    adjusted = check(logits, make_batch(penalties=rows), tokens)
    assert adjusted[1, 17] < -2000
    assert torch.equal(adjusted[0], logits[0])


@pytest.mark.launches("count_tokens_kernel", "penalise_kernel")
def test_what_lies_behind_a_sequence_or_outside_of_the_vocabulary_is_not_touched():
    tokens = torch.tensor([[1, 3, 2, 4, 4]], dtype=torch.int32)
    rows = penalised_rows(np.random.default_rng(0), [0], [0], [3])
    rows.prompt_lens[:], rows.repetition[:], rows.presence[:] = 1, 1.0, 1.0
    logits = torch.zeros(1, 5)
    check(logits, make_batch(penalties=rows), tokens)
    tokens[0, 1:3] = torch.tensor([-1, 5])
    adjust_(logits, Uploads(CPU)(adjustment_arrays(make_batch(penalties=rows))), tokens)
    assert not logits.any()
