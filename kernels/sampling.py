"""From logits to tokens, for all rows of a step at once.

    raw logits ──▶ log-probabilities to report
        │
        ▼
    bias, masks, penalties ──▶ argmax                                 greedy rows
        │
        ▼
    ÷ temperature ──▶ integer weights ──▶ inverse CDF                 random rows
                             └──▶ top_k, top_p, min_p ──▶ inverse CDF  random rows with a filter

A drawn token is a function of its row's logits, parameters and uniform number only, bit for bit, whatever other rows
are in the batch. Float sums would break that: their rounding depends on the order of addition, which libraries choose
by the shape of the batch. So probabilities become integers, exp(x - max) in fixed point, before anything is added up
or compared; integer sums are exact in any order and on every device.

Invalid logits never raise: not-a-number counts as the smallest number and infinities as the largest (smallest), so
that some valid token id is drawn. A greedy row with NaN gets the first NaN's id.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .logit_adjustments import LogitAdjustments

MIN_TEMPERATURE = 1e-5
"""Below this a row is greedy."""
MIN_LOGPROB = -9999.0
"""Reported instead of anything smaller, as OpenAI's API does; JSON has no infinity."""

_FLOAT_MAX = torch.finfo(torch.float32).max
_FIRST_CANDIDATES = 256
"""top_p without top_k sorts so many of the largest weights first, and more only if their mass does not suffice."""

_CPU_GROUP_ELEMENTS = 2**18
"""Logits that a CPU works on at a time: 32 rows of 32,000 take 2.5 ms in groups and 10 ms at once (1 core)."""


@dataclasses.dataclass(slots=True)
class SamplingBatch:
    """The sampling parameters of S rows, on the host."""

    temperature: NDArray[np.float64]
    top_p: NDArray[np.float64]
    top_k: NDArray[np.int64]
    """0: no limit."""
    min_p: NDArray[np.float64]
    uniform: NDArray[np.float64]
    """In [0, 1), from `philox.uniforms`; used by random rows."""
    logprobs: NDArray[np.int64]
    """Alternatives to report; 0: the chosen token only; -1: nothing."""
    adjustments: LogitAdjustments | None


@dataclasses.dataclass(slots=True)
class SampledTokens:
    """The outcome for S rows."""

    tokens: list[int]
    logprobs: list[tuple[float, list[tuple[int, float]]] | None] | None
    """Per row that asked: log-probability of the token, then (id, log-probability) of the most likely ones."""


def argmax(logits: Tensor) -> Tensor:
    """[S, vocab] → [S] int64: the largest of every row; a kernel may take its place."""
    return logits.argmax(dim=-1)


def sample(logits: Tensor, batch: SamplingBatch, argmax: Callable[[Tensor], Tensor] = argmax) -> SampledTokens:
    """Choose one token per row.

    Args:
        logits: [S, vocab] float32; overwritten if the batch has adjustments.
        batch: parameters of the rows.
        argmax: as `Kernels.argmax`.
    """
    asked = np.flatnonzero(batch.logprobs >= 0)
    # Of the model's distribution, so before anything changes the logits.
    raw_logprobs = _log_probabilities(_take(logits, asked)) if asked.size else None
    if batch.adjustments is not None:
        batch.adjustments.apply_(logits)

    temperature = np.nan_to_num(batch.temperature)
    tokens = argmax(logits)
    unfiltered = (batch.top_k <= 0) & (batch.top_p >= 1.0)
    drawn = temperature >= MIN_TEMPERATURE
    for rows, draw in (
        (np.flatnonzero(drawn & unfiltered), _draw_unfiltered),
        (np.flatnonzero(drawn & ~unfiltered), _draw_filtered),
    ):
        for part in _split(rows, logits):
            weights = _weights(_take(logits, part), temperature[part])
            tokens[torch.from_numpy(part).to(logits.device)] = draw(weights, batch, part)
    chosen = tokens.tolist()
    if raw_logprobs is None:
        return SampledTokens(chosen, None)
    return SampledTokens(chosen, _report(raw_logprobs, asked, chosen, batch.logprobs))


def _take(logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """The given rows; no copy if they are all rows."""
    return logits if len(rows) == len(logits) else logits[torch.from_numpy(rows).to(logits.device)]


def _split(rows: NDArray[np.int64], logits: Tensor) -> list[NDArray[np.int64]]:
    """Rows in groups whose temporaries stay in a CPU's cache; a GPU takes all at once. Draws are per row, so free."""
    if not rows.size:
        return []
    if logits.device.type != "cpu":
        return [rows]
    return np.array_split(rows, min(len(rows), -(-rows.size * logits.shape[1] // _CPU_GROUP_ELEMENTS)))


def _id_bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def _weight_bits(vocab_size: int) -> int:
    """Fixed-point bits of a weight: a weight with a token id beside it, and a sum of weights, fit in 63 bits."""
    return min(44, 62 - _id_bits(vocab_size))


def _weights(logits: Tensor, temperature: NDArray[np.float64]) -> Tensor:
    """[N, V] float32 to [N, V] int64: exp((x - max) / temperature) in fixed point; every row's largest is 2**bits."""
    scaled = torch.nan_to_num(logits, nan=-_FLOAT_MAX, posinf=_FLOAT_MAX, neginf=-_FLOAT_MAX)
    scaled -= scaled.amax(dim=-1, keepdim=True)  # before the division, which could overflow
    scaled /= _column(np.minimum(temperature, _FLOAT_MAX).astype(np.float32), logits)
    return scaled.exp_().mul_(2.0 ** _weight_bits(logits.shape[1])).to(torch.int64)


def _draw_unfiltered(weights: Tensor, batch: SamplingBatch, rows: NDArray[np.int64]) -> Tensor:
    """Draw from all tokens, or from those above min_p, which needs no order. Returns [N] token ids."""
    if (batch.min_p[rows] > 0).any():
        weights = weights.where(weights >= _min_p_weight(batch, rows, weights), 0)
    return _inverse_cdf(weights, batch, rows).squeeze(1)


def _draw_filtered(weights: Tensor, batch: SamplingBatch, rows: NDArray[np.int64]) -> Tensor:
    """Draw from the tokens that pass top_k, then top_p of what is left, then min_p. Returns [N] token ids."""
    vocab_size = weights.shape[1]
    id_bits = _id_bits(vocab_size)
    id_mask = (1 << id_bits) - 1
    # One integer per token that orders by weight and then by lower id: no two are equal, so the order is unique.
    keys = (weights << id_bits) | (id_mask - torch.arange(vocab_size, device=weights.device))

    top_k, top_p = batch.top_k[rows], _column(batch.top_p[rows], weights)
    bounded = top_k > 0
    num_candidates = min(vocab_size, max(int(top_k.max()), 0 if bounded.all() else _FIRST_CANDIDATES))
    unbounded_mass = weights.sum(dim=-1, keepdim=True)
    limit = _column(np.where(bounded, top_k, vocab_size), weights)
    while True:
        candidates = keys.topk(num_candidates, dim=-1).values
        mass = candidates >> id_bits
        mass *= torch.arange(num_candidates, device=weights.device) < limit
        before = mass.cumsum(dim=-1) - mass
        total = torch.where(_column(bounded, weights), mass.sum(dim=-1, keepdim=True), unbounded_mass)
        needed = total.double() * top_p
        last = (before[:, -1:] + mass[:, -1:]).double()
        if num_candidates == vocab_size or bounded.all() or bool((last >= needed).all()):
            break
        num_candidates = min(vocab_size, num_candidates * 8)

    # The smallest set that holds top_p of the mass: a token stays if those before it hold less.
    kept = (before.double() < needed) & (mass >= _min_p_weight(batch, rows, weights))
    kept[:, 0] = True
    ids, order = (id_mask - (candidates & id_mask)).sort(dim=-1)
    choice = _inverse_cdf((mass * kept).gather(1, order), batch, rows)
    return ids.gather(1, choice).squeeze(1)


def _inverse_cdf(weights: Tensor, batch: SamplingBatch, rows: NDArray[np.int64]) -> Tensor:
    """The first column whose cumulative weight exceeds uniform · total. [N, K] int64 to [N, 1] int64."""
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1:]
    target = (total.double() * _column(batch.uniform[rows], weights)).to(torch.int64)
    return torch.searchsorted(cdf, torch.minimum(target, total - 1), right=True)


def _min_p_weight(batch: SamplingBatch, rows: NDArray[np.int64], weights: Tensor) -> Tensor:
    """[N, 1] int64: the least weight that passes min_p, given that the largest weight is 2**bits."""
    fraction = np.clip(np.nan_to_num(batch.min_p[rows]), 0.0, 1.0)
    return _column((fraction * 2.0 ** _weight_bits(weights.shape[1])).astype(np.int64), weights)


def _column(values: NDArray, like: Tensor) -> Tensor:
    """[N] on the host to [N, 1] on the device of `like`."""
    return torch.from_numpy(values).to(like.device)[:, None]


def _log_probabilities(logits: Tensor) -> Tensor:
    """[N, V] float32: log softmax, finite."""
    finite = torch.nan_to_num(logits, nan=-_FLOAT_MAX, posinf=_FLOAT_MAX, neginf=-_FLOAT_MAX)
    return finite.log_softmax(dim=-1).clamp_(min=MIN_LOGPROB, max=0.0)


def _report(
    logprobs: Tensor, asked: NDArray[np.int64], tokens: list[int], alternatives: NDArray[np.int64]
) -> list[tuple[float, list[tuple[int, float]]] | None]:
    """The chosen token's log-probability and the most likely alternatives of the rows that asked."""
    vocab_size = logprobs.shape[1]
    most = min(vocab_size, int(alternatives[asked].max()))
    chosen_ids = torch.tensor([tokens[row] for row in asked.tolist()], device=logprobs.device)
    chosen = logprobs.gather(1, chosen_ids[:, None]).squeeze(1).tolist()
    # The bits of a float that is not positive grow as it falls: with the id below them, the smallest integers are the
    # most likely tokens, in an order without ties.
    id_bits = _id_bits(vocab_size)
    keys = logprobs.abs().view(torch.int32).to(torch.int64) << id_bits
    keys |= torch.arange(vocab_size, device=logprobs.device)
    ids = keys.topk(most, dim=-1, largest=False).values & ((1 << id_bits) - 1)
    tops = [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), logprobs.gather(1, ids).tolist(), strict=True)]

    reports: list[tuple[float, list[tuple[int, float]]] | None] = [None] * len(tokens)
    for row, value, top in zip(asked.tolist(), chosen, tops, strict=True):
        reports[row] = (value, top[: alternatives[row]])
    return reports
