"""Log-probabilities to report: of the token that was chosen, and of the most likely ones with their ids.

The distribution is the model's own, before anything is adjusted. Alternatives are ordered by log-probability and then
by lower id; both in one integer, whose smallest is the first:

    | bits of -logprob, 31 | id, 32 |    the bits of a float that is not negative grow with it
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from .argmax import finite, split_size, warps

MIN_LOGPROB = tl.constexpr(-9999.0)
"""As in `kernels/sampling.py`."""
MAX_SELECTED = 32
"""So many alternatives, a power of two, are selected in the kernels, one by one. More, which no request of OpenAI's API
asks for, are left to torch."""
_LAST_KEY = tl.constexpr(2**63 - 1)
_GROUP_KEYS = 2**23
"""Keys that exist at a time, 64 MiB, where torch selects."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reported:
    """Log-probabilities of a step."""

    wanted: NDArray[np.int64]
    """[S] alternatives per row, on the host; -1 for rows that report nothing; A others."""
    chosen: Tensor
    """[A] float32: of the rows' tokens."""
    top_ids: Tensor
    """[A, most of `wanted`] int32, the most likely first."""
    top_logprobs: Tensor
    """[A, most of `wanted`] float32."""

    def entries(self) -> list[tuple[float, list[tuple[int, float]]] | None]:
        """As `kernels.sampling.SampledTokens.logprobs`; only of tensors on the host."""
        reports = zip(self.chosen.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        entries: list[tuple[float, list[tuple[int, float]]] | None] = []
        for count in self.wanted.tolist():
            if count < 0:
                entries.append(None)
            else:
                chosen, ids, values = next(reports)
                entries.append((chosen, list(zip(ids[:count], values[:count], strict=True))))
        return entries


@triton.jit
def log_sum(maxima_ptr, sums_ptr, index, splits, BLOCK_S: tl.constexpr):
    """(largest logit, logarithm of the sum of exp(x - largest)) of a reported row."""
    indices = tl.arange(0, BLOCK_S)
    mask = indices < splits
    maxima = tl.load(maxima_ptr + index * splits + indices, mask=mask, other=-float("inf"))
    sums = tl.load(sums_ptr + index * splits + indices, mask=mask, other=0.0)
    maximum = tl.max(maxima, 0)
    return maximum, tl.log(tl.sum(sums * tl.exp(maxima - maximum), 0))


@triton.jit
def logprob(x, maximum, logarithm):
    """float32, finite."""
    return tl.minimum(tl.maximum((finite(x) - maximum) - logarithm, MIN_LOGPROB), 0.0)


@triton.jit
def logprob_keys(logits_ptr, row, stride, ids, vocab, maximum, logarithm):
    """int64 keys of tokens; behind the vocabulary larger than all."""
    mask = ids < vocab
    x = tl.load(logits_ptr + row * stride + ids, mask=mask, other=0.0)
    bits = tl.abs(logprob(x, maximum, logarithm)).to(tl.int32, bitcast=True)
    return tl.where(mask, (bits.to(tl.int64) << 32) | ids.to(tl.int64), _LAST_KEY)


@triton.jit
def split_log_sum_kernel(
    logits_ptr, rows_ptr, maxima_ptr, sums_ptr, stride, vocab, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (split, reported row): the split's largest logit and the sum of exponentials relative to it."""
    split, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab
    x = tl.load(logits_ptr + row * stride + ids, mask=mask, other=0.0)
    x = tl.where(mask, finite(x), -float("inf"))
    maximum = tl.max(x, 0)
    place = index * tl.num_programs(0) + split
    tl.store(maxima_ptr + place, maximum)
    tl.store(sums_ptr + place, tl.sum(tl.exp(x - maximum), 0))


@triton.jit(do_not_specialize=["alternatives"])
def split_top_logprobs_kernel(
    logits_ptr, rows_ptr, maxima_ptr, sums_ptr, keys_ptr, stride, vocab, alternatives, SELECTED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (split, reported row): the `alternatives` smallest keys of the split, of SELECTED at most."""
    split, splits, index = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    maximum, logarithm = log_sum(maxima_ptr, sums_ptr, index, splits, BLOCK_S)
    keys = logprob_keys(logits_ptr, row, stride, split * BLOCK + tl.arange(0, BLOCK), vocab, maximum, logarithm)
    for i in range(alternatives):
        smallest = tl.min(keys, 0)
        tl.store(keys_ptr + (index * splits + split) * SELECTED + i, smallest)
        keys = tl.where(keys == smallest, _LAST_KEY, keys)


@triton.jit(do_not_specialize=["alternatives"])
def merge_top_logprobs_kernel(
    keys_ptr, ids_ptr, values_ptr, splits, alternatives, SELECTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per reported row: the `alternatives` smallest of its splits' keys; BLOCK covers them all."""
    index = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    mask = (places < splits * SELECTED) & (places % SELECTED < alternatives)
    keys = tl.load(keys_ptr + index * splits * SELECTED + places, mask=mask, other=_LAST_KEY)
    for i in range(alternatives):
        smallest = tl.min(keys, 0)
        value = 0.0 - (smallest >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(ids_ptr + index * alternatives + i, (smallest & 0xFFFFFFFF).to(tl.int32))
        tl.store(values_ptr + index * alternatives + i, value)
        keys = tl.where(keys == smallest, _LAST_KEY, keys)


@triton.jit(do_not_specialize=["first"])
def all_logprob_keys_kernel(
    logits_ptr, rows_ptr, maxima_ptr, sums_ptr, keys_ptr, first, stride, vocab, BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (split, reported row - first): every key of the split."""
    split, splits, place = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    index = first + place
    row = tl.load(rows_ptr + index).to(tl.int64)
    maximum, logarithm = log_sum(maxima_ptr, sums_ptr, index, splits, BLOCK_S)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    keys = logprob_keys(logits_ptr, row, stride, ids, vocab, maximum, logarithm)
    tl.store(keys_ptr + place * vocab + ids, keys, mask=ids < vocab)


@triton.jit
def chosen_logprobs_kernel(
    logits_ptr, rows_ptr, reported_ptr, tokens_ptr, maxima_ptr, sums_ptr, chosen_ptr, stride, splits,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per reported row: the log-probability of its token."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    token = tl.load(tokens_ptr + tl.load(reported_ptr + index))
    maximum, logarithm = log_sum(maxima_ptr, sums_ptr, index, splits, BLOCK_S)
    tl.store(chosen_ptr + index, logprob(tl.load(logits_ptr + row * stride + token), maximum, logarithm))


class LogProbabilities:
    """Of `rows` [A] int32 of `logits` [S, vocab] float32, both on the device; the logits must not change meanwhile."""

    def __init__(self, logits: Tensor, rows: Tensor) -> None:
        self._logits, self._rows = logits, rows
        self._vocab_size = logits.shape[1]
        self._block = split_size(self._vocab_size)
        self._splits = triton.cdiv(self._vocab_size, self._block)
        self._block_s = triton.next_power_of_2(self._splits)
        # Two tensors: a part of one would begin at a place that depends on the rows, and be compiled for anew.
        self._maxima, self._sums = (torch.empty(len(rows), self._splits, device=logits.device) for _ in range(2))
        split_log_sum_kernel[(self._splits, len(rows))](
            logits, rows, self._maxima, self._sums, logits.stride(0), self._vocab_size, BLOCK=self._block,
            num_warps=warps(self._block),
        )  # fmt: skip

    def chosen(self, tokens: Tensor, reported: Tensor) -> Tensor:
        """[A] float32: of the tokens `tokens[reported]`, int64 and [A] int32."""
        chosen = torch.empty(len(self._rows), device=tokens.device)
        chosen_logprobs_kernel[(len(self._rows),)](
            self._logits, self._rows, reported, tokens, self._maxima, self._sums, chosen, self._logits.stride(0),
            self._splits, BLOCK_S=self._block_s, num_warps=1,
        )  # fmt: skip
        return chosen

    def top(self, alternatives: int) -> tuple[Tensor, Tensor]:
        """The most likely tokens: ids [A, alternatives] int32 and their log-probabilities, float32.

        Args:
            alternatives: at most the vocabulary's size.
        """
        if alternatives > MAX_SELECTED:
            return self._top_of_many(alternatives)
        num_rows, device = len(self._rows), self._logits.device
        ids = torch.empty(num_rows, alternatives, dtype=torch.int32, device=device)
        values = torch.empty(num_rows, alternatives, device=device)
        if alternatives:
            keys = torch.empty(num_rows, self._splits, MAX_SELECTED, dtype=torch.int64, device=device)
            split_top_logprobs_kernel[(self._splits, num_rows)](
                self._logits, self._rows, self._maxima, self._sums, keys, self._logits.stride(0), self._vocab_size,
                alternatives, SELECTED=MAX_SELECTED, BLOCK=self._block, BLOCK_S=self._block_s,
                num_warps=warps(self._block),
            )  # fmt: skip
            merge_top_logprobs_kernel[(num_rows,)](
                keys, ids, values, self._splits, alternatives,
                SELECTED=MAX_SELECTED, BLOCK=self._block_s * MAX_SELECTED, num_warps=4,
            )  # fmt: skip
        return ids, values

    def _top_of_many(self, alternatives: int) -> tuple[Tensor, Tensor]:
        parts = []
        group = max(1, _GROUP_KEYS // self._vocab_size)
        for first in range(0, len(self._rows), group):
            num_rows = min(group, len(self._rows) - first)
            keys = torch.empty(num_rows, self._vocab_size, dtype=torch.int64, device=self._logits.device)
            all_logprob_keys_kernel[(self._splits, num_rows)](
                self._logits, self._rows, self._maxima, self._sums, keys, first, self._logits.stride(0),
                self._vocab_size, BLOCK=self._block, BLOCK_S=self._block_s, num_warps=warps(self._block),
            )  # fmt: skip
            parts.append(keys.topk(alternatives, dim=-1, largest=False).values)
        smallest = torch.cat(parts)
        return (smallest & 0xFFFFFFFF).to(torch.int32), 0.0 - (smallest >> 32).to(torch.int32).view(torch.float32)
