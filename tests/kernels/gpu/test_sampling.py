"""Sampling on the device against the reference: whole batches, and every draw from the same integer weights exactly."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from raytroupe.kernels import sampling as reference
from raytroupe.kernels.gpu.argmax import finite
from raytroupe.kernels.gpu.philox import uniform
from raytroupe.kernels.gpu.sampling import DeviceBatch, DeviceSampler, DeviceSamples, PenalisedRows
from raytroupe.kernels.gpu.weights import load_weights, weight_bits
from raytroupe.kernels.logit_adjustments import LogitAdjustments, Penalties
from raytroupe.kernels.philox import uniforms
from raytroupe.kernels.uploads import Uploads

CPU = torch.device("cpu")
DRAWS = pytest.mark.launches("split_argmax_kernel", "sum_weights_kernel", "list_candidates_kernel", "draw_kernel")
# numpy warns where a GPU goes on with infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
NO_TOKENS = torch.zeros(1, 1, dtype=torch.int32)


def make_batch(num_rows: int, **columns: object) -> DeviceBatch:
    """Greedy rows that ask for nothing, with the given columns (a list, or one value for all rows)."""
    defaults = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0, "position": 0, "logprobs": -1}
    values = {
        name: np.broadcast_to(
            np.asarray(columns.pop(name, default), np.int64 if isinstance(default, int) else np.float64), (num_rows,)
        ).copy()
        for name, default in defaults.items()
    }
    values["seed"] = values["seed"].astype(np.uint64)
    edits = {
        name: columns.pop(name, np.zeros(0, np.float32 if name == "bias_values" else np.int64))
        for name in ("bias_rows", "bias_tokens", "bias_values", "masked_rows", "masked_tokens")
    }
    return DeviceBatch(**values, **edits, penalties=columns.pop("penalties", None), **columns)


def run(logits: torch.Tensor, batch: DeviceBatch | None, tokens=NO_TOKENS, candidates: int = 64) -> DeviceSamples:
    rows, vocab_size = logits.shape
    return DeviceSampler(vocab_size, rows, CPU, candidates).sample(logits.clone(), batch, tokens, Uploads(CPU))


def sample_on_host(logits: torch.Tensor, batch: DeviceBatch, tokens=NO_TOKENS) -> reference.SampledTokens:
    """`kernels.sampling.sample` of the same batch."""
    rows = batch.penalties
    penalties = rows and Penalties(
        rows.rows, tokens.numpy()[rows.slots], rows.lengths, rows.prompt_lens, rows.repetition, rows.presence,
        rows.frequency,
    )  # fmt: skip
    edits = (batch.bias_rows, batch.bias_tokens, batch.bias_values, batch.masked_rows, batch.masked_tokens)
    return reference.sample(logits.clone(), host_batch(batch, LogitAdjustments(*edits, penalties)))


def host_batch(batch: DeviceBatch, adjustments: LogitAdjustments | None = None) -> reference.SamplingBatch:
    return reference.SamplingBatch(
        batch.temperature, batch.top_p, batch.top_k, batch.min_p, uniforms(batch.seed, batch.position), batch.logprobs,
        adjustments,
    )  # fmt: skip


@triton.jit
def weigh_kernel(logits_ptr, temperature_ptr, out_ptr, vocab, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """The weights as the sampler's kernels compute them."""
    row = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    mask = ids < vocab
    maximum = tl.max(tl.where(mask, finite(tl.load(logits_ptr + row * vocab + ids, mask=mask, other=0.0)), -3.4e38), 0)
    temperature = tl.load(temperature_ptr + row)
    weights = load_weights(logits_ptr + row * vocab, ids, vocab, maximum, temperature, SCALE)
    tl.store(out_ptr + row * vocab + ids, weights.to(tl.int64), mask=mask)


def device_weights(logits: torch.Tensor, temperature: np.ndarray) -> torch.Tensor:
    rows, vocab_size = logits.shape
    out = torch.empty(rows, vocab_size, dtype=torch.int64)
    weigh_kernel[(rows,)](
        logits, torch.from_numpy(temperature.astype(np.float32)), out, vocab_size,
        SCALE=2.0 ** weight_bits(vocab_size), BLOCK=triton.next_power_of_2(vocab_size),
    )  # fmt: skip
    return out


def exact_draws(logits: torch.Tensor, batch: DeviceBatch) -> list[int]:
    """The reference's draws from the device's weights, so that the last place of an exponential does not matter."""
    weights = device_weights(logits, batch.temperature)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    unfiltered = (batch.top_k <= 0) & (batch.top_p >= 1.0)
    for draw, rows in (
        (reference._draw_unfiltered, np.flatnonzero(unfiltered)),
        (reference._draw_filtered, np.flatnonzero(~unfiltered)),
    ):
        if rows.size:
            tokens[torch.from_numpy(rows)] = draw(weights[torch.from_numpy(rows)], host_batch(batch), rows)
    return tokens.tolist()


@triton.jit
def uniform_kernel(seeds_ptr, positions_ptr, out_ptr):
    index = tl.program_id(0)
    tl.store(out_ptr + index, uniform(tl.load(seeds_ptr + index), tl.load(positions_ptr + index)))


@pytest.mark.launches("uniform_kernel")
def test_random_numbers_are_those_of_the_host():
    rng = np.random.default_rng(11)
    seeds = np.concatenate((rng.integers(0, 2**64, 30, dtype=np.uint64), np.array([0, 1, 2**64 - 1], np.uint64)))
    positions = np.concatenate((rng.integers(0, 2**20, 30), np.array([0, 2**32 + 5, 2**63 - 1])))
    out = torch.empty(33, dtype=torch.float64)
    uniform_kernel[(33,)](torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(positions), out)
    assert out.tolist() == uniforms(seeds, positions).tolist()


@pytest.mark.launches("weigh_kernel")
def test_weights_are_the_reference_but_for_the_last_places_of_the_exponential():
    rng = np.random.default_rng(12)
    logits = torch.from_numpy(rng.normal(0, 8, (4, 600)).astype(np.float32))
    logits[2, :4] = torch.tensor([torch.nan, -torch.inf, torch.inf, 3e38])
    temperature = np.array([0.3, 1.0, 1e38, 1e-5])
    expected = reference._weights(logits, temperature).double()
    torch.testing.assert_close(device_weights(logits, temperature).double(), expected, rtol=1e-6, atol=1.0)


def some_logits(rng: np.random.Generator, rows: int, vocab_size: int) -> torch.Tensor:
    """Rows that are peaked, flat, full of ties, or all equal."""
    spread = rng.choice([0.0, 0.05, 1.0, 3.0, 12.0], (rows, 1))
    logits = rng.normal(0, 1, (rows, vocab_size)) * spread
    tied = rng.random((rows, 1)) < 0.5
    return torch.from_numpy(np.where(tied, np.round(logits * 4) / 4, logits).astype(np.float32))


@DRAWS
@pytest.mark.launches("weigh_kernel")
@pytest.mark.parametrize(
    ("vocab_size", "rows", "candidates"), [(1, 6, 16), (3, 16, 2), (257, 24, 32), (1000, 12, 2048), (5003, 12, 256)]
)
def test_draws_are_exactly_those_of_the_reference(vocab_size, rows, candidates, generator):
    rng = np.random.default_rng(generator.initial_seed())
    logits = some_logits(rng, rows, vocab_size)
    batch = make_batch(
        rows,
        temperature=rng.choice([0.3, 1.0, 2.0, 50.0, 1e-5, 1e30], rows, p=[0.2, 0.4, 0.2, 0.1, 0.05, 0.05]),
        top_k=rng.choice([0, 0, 0, 1, 5, 40, vocab_size, vocab_size + 9], rows),
        top_p=rng.choice([1.0, 1.0, 0.0, 0.3, 0.9, 0.999, math.nan, 1.5], rows),
        min_p=rng.choice([0.0, 0.0, 1e-6, 0.05, 1.0, math.nan], rows),
        seed=rng.integers(0, 2**62, rows),
        position=rng.integers(0, 2**20, rows),
    )
    assert run(logits, batch, candidates=candidates).tokens.tolist() == exact_draws(logits, batch)


@DRAWS
def test_rows_too_flat_for_the_candidates_are_searched_whole():
    """8 candidates of 700 tokens: every option's border lies outside of them, on equal weights and on single ones."""
    rng = np.random.default_rng(13)
    options = [(k, p, m) for k in (0, 9, 400) for p, m in ((0.05, 0.0), (0.99, 0.4))]
    rows = 2 * len(options)
    logits = torch.from_numpy(rng.normal(0, 0.5, (rows, 700)).astype(np.float32))
    logits[len(options) :] = (logits[len(options) :] * 5).round() / 5
    top_k, top_p, min_p = zip(*options * 2, strict=True)
    batch = make_batch(
        rows, temperature=1.0, top_k=list(top_k), top_p=list(top_p), min_p=list(min_p), seed=np.arange(rows)
    )
    assert run(logits, batch, candidates=8).tokens.tolist() == exact_draws(logits, batch)


@DRAWS
def test_ties_at_the_border_keep_the_lower_ids():
    rows = 15
    batch = make_batch(
        rows,
        temperature=1.0,
        seed=np.arange(rows),
        top_k=[4, 0, 500] * (rows // 3),
        top_p=[1.0, 0.0035, 0.007] * (rows // 3),
    )
    for candidates in (16, 1024):
        tokens = run(torch.zeros(rows, 1000), batch, candidates=candidates).tokens.reshape(-1, 3)
        assert tokens.max() == 3
        assert tokens.unique().tolist() == [0, 1, 2, 3]


def mixed_batch(rows: int, vocab_size: int, seed: int) -> tuple[torch.Tensor, DeviceBatch, torch.Tensor]:
    """Rows of every kind, with penalties, bias, masks and log-probabilities on some of them; and a token table."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 2, (rows, vocab_size)).astype(np.float32))
    tokens = torch.from_numpy(rng.integers(0, vocab_size, (rows, 40), dtype=np.int32))
    penalised = np.sort(rng.choice(rows, rows // 3, replace=False))
    count = len(penalised)
    lengths = rng.integers(1, 41, count)
    biased, masked = np.arange(0, rows, 3), np.arange(0, rows, 4)
    batch = make_batch(
        rows,
        temperature=rng.choice([0.0, 0.7, 1.0, 5.0], rows),
        top_k=rng.choice([0, 0, 5, 300], rows),
        top_p=rng.choice([1.0, 0.9, 0.3], rows),
        min_p=rng.choice([0.0, 0.05], rows),
        seed=rng.integers(0, 2**62, rows),
        position=rng.integers(0, 2**20, rows),
        logprobs=rng.choice([-1, 0, 3, 7], rows),
        bias_rows=biased,
        bias_tokens=rng.integers(0, vocab_size, len(biased)),
        bias_values=rng.normal(0, 5, len(biased)).astype(np.float32),
        masked_rows=masked,
        masked_tokens=rng.integers(0, vocab_size, len(masked)),
        penalties=PenalisedRows(
            penalised, rng.permutation(rows)[:count], lengths, rng.integers(1, lengths + 1),
            *(rng.choice(values, count).astype(np.float32) for values in ([1.0, 1.3], [0.0, 0.5], [0.0, 0.25])),
        ),
    )  # fmt: skip
    return logits, batch, tokens


@DRAWS
@pytest.mark.launches("penalise_kernel", "edit_logits_kernel", "split_top_logprobs_kernel", "chosen_logprobs_kernel")
@pytest.mark.parametrize("vocab_size", [37, 1021, 5003])
def test_a_mixed_batch_is_sampled_like_on_the_host(vocab_size):
    logits, batch, tokens = mixed_batch(15, vocab_size, seed=vocab_size)
    got, expected = run(logits, batch, tokens), sample_on_host(logits, batch, tokens)
    assert got.tokens.tolist() == expected.tokens
    for mine, other in zip(got.map(torch.clone).reports(), expected.logprobs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine[0] == pytest.approx(other[0], abs=1e-5)
            assert [token for token, _ in mine[1]] == [token for token, _ in other[1]]
            assert [value for _, value in mine[1]] == pytest.approx([value for _, value in other[1]], abs=1e-5)


def take_rows(batch: DeviceBatch, rows: np.ndarray) -> DeviceBatch:
    """The batch that holds the given rows in the given order."""
    new_row = np.full(len(batch), -1)
    new_row[rows] = np.arange(len(rows))
    biased, masked = new_row[batch.bias_rows] >= 0, new_row[batch.masked_rows] >= 0
    penalised = new_row[batch.penalties.rows] >= 0
    penalties = None
    if penalised.any():
        columns = {f.name: getattr(batch.penalties, f.name)[penalised] for f in dataclasses.fields(PenalisedRows)}
        penalties = PenalisedRows(**columns | {"rows": new_row[columns["rows"]]})
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "position", "logprobs")
    return DeviceBatch(
        **{name: getattr(batch, name)[rows] for name in names},
        bias_rows=new_row[batch.bias_rows[biased]],
        bias_tokens=batch.bias_tokens[biased],
        bias_values=batch.bias_values[biased],
        masked_rows=new_row[batch.masked_rows[masked]],
        masked_tokens=batch.masked_tokens[masked],
        penalties=penalties,
    )


@DRAWS
def test_a_row_gives_the_same_bits_alone_and_in_any_batch():
    logits, batch, tokens = mixed_batch(8, 4500, seed=5)
    together = run(logits, batch, tokens)
    reports = together.reports()
    groups = [np.array([row]) for row in range(8)] + np.array_split(np.random.default_rng(1).permutation(8), 3)
    for rows in groups:
        apart = run(logits[torch.from_numpy(rows)], take_rows(batch, rows), tokens)
        assert apart.tokens.tolist() == together.tokens[torch.from_numpy(rows)].tolist()
        assert (apart.reports() or [None] * len(rows)) == [reports[row] for row in rows]


def test_a_greedy_batch_launches_the_argmax_and_nothing_else(monkeypatch):
    launched = []
    launch = InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **k: launched.append(self.fn.__name__) or launch(self, *a, **k)
    )
    samples = run(torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]]), None)
    assert samples.tokens.tolist() == [1, 0]
    assert samples.reports() is None
    assert launched == ["split_argmax_kernel", "merge_argmax_kernel"]


@DRAWS
def test_one_upload_per_batch_and_rows_that_are_parts_of_longer_ones():
    logits, batch, tokens = mixed_batch(12, 300, seed=8)
    padded = torch.full((12, 320), torch.nan)
    padded[:, :300] = logits
    uploads, calls = Uploads(CPU), []

    def count(arrays):
        calls.append(list(arrays))
        return uploads(arrays)

    samples = DeviceSampler(300, 50, CPU).sample(padded[:, :300], batch, tokens, count)
    expected = run(logits, batch, tokens)
    assert samples.tokens.tolist() == expected.tokens.tolist()
    assert samples.reports() == expected.reports()
    assert len(calls) == 1


@pytest.mark.launches("sum_weights_kernel", "draw_kernel")
@pytest.mark.parametrize(("filters", "draws"), [({}, 200), ({"top_p": 0.8}, 50)])
def test_drawn_tokens_have_the_frequencies_of_the_distribution(filters, draws):
    logits = torch.full((draws, 300), -40.0)
    logits[:, [3, 50, 51, 120, 298]] = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0])
    batch = make_batch(draws, temperature=0.9, seed=7, position=np.arange(draws), **filters)
    tokens = run(logits, batch).tokens.numpy()
    expected = np.exp((logits[0].double().numpy() - 2.0) / 0.9)
    expected[expected < 1e-9] = 0.0
    if "top_p" in filters:
        expected[[50, 298]] = 0.0  # the others hold 0.87, and without 51 0.74
    expected *= draws / expected.sum()
    counts = np.bincount(tokens, minlength=300)
    assert (counts[expected == 0.0] == 0).all()
    likely = expected > 0.0
    chi_square = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    assert chi_square < 20  # at most 4 degrees of freedom; the inputs are fixed


@DRAWS
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
def test_invalid_numbers_give_the_tokens_of_the_reference_and_finite_log_probabilities(values):
    options = [
        (filters, temperature)
        for filters in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_p": math.nan})
        for temperature in (0.0, 1.0, 1e300, math.inf, math.nan)
    ]
    columns = {
        name: [filters.get(name, default) for filters, _ in options]
        for name, default in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    }
    batch = make_batch(
        len(options), temperature=[temperature for _, temperature in options], seed=range(25), logprobs=4, **columns
    )
    logits = torch.tensor([values] * len(options))
    samples = run(logits, batch)
    assert samples.tokens.tolist() == sample_on_host(logits, batch).tokens
    for chosen, top in samples.reports():
        assert math.isfinite(chosen)
        assert all(math.isfinite(value) for _, value in top)
