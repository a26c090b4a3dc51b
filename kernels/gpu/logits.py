"""What requests ask to be changed in their logits, in place: bias, masked stop tokens, penalties.

The meaning is that of `kernels/logit_adjustments.py`, to the bit. Nothing passes over the whole vocabulary but the
zeroing of the counts: a bias touches its own logits, and penalties those of the tokens that a sequence knows:

    token table [slot]   5 17 5 9 …         every occurrence is counted at its token
    counts [P, vocab]    … 2 … 1 … 1        the first program that takes a token's count away penalises it

The counts of a step are one integer per token: bit 0 is set if it occurs in the prompt, the rest counts the output.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from .sampling_batch import DeviceBatch

_BLOCK = 1024
_PROGRAMS = 16
"""Per penalised row, each with every 16th block of its tokens: how long rows are changes no launch."""


@triton.jit(do_not_specialize=["entries"])
def edit_logits_kernel(rows_ptr, tokens_ptr, values_ptr, logits_ptr, stride, entries, BLOCK: tl.constexpr):
    """logits[row, token] += value; minus infinity replaces whatever was there, NaN too."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < entries
    row = tl.load(rows_ptr + index, mask=mask, other=0).to(tl.int64)
    token = tl.load(tokens_ptr + index, mask=mask, other=0)
    value = tl.load(values_ptr + index, mask=mask, other=0.0)
    place = logits_ptr + row * stride + token
    x = tl.load(place, mask=mask, other=0.0)
    tl.store(place, tl.where(value == -float("inf"), value, x + value), mask=mask)


@triton.jit
def count_tokens_kernel(
    places_ptr, tokens_ptr, counts_ptr, tokens_stride, vocab, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (part, penalised row)."""
    part, parts, index = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(places_ptr + index * 4 + 1)
    length = tl.load(places_ptr + index * 4 + 2)
    prompt_len = tl.load(places_ptr + index * 4 + 3)
    for start in range(part * BLOCK, length, parts * BLOCK):
        positions = start + tl.arange(0, BLOCK)
        token = tl.load(tokens_ptr + slot * tokens_stride + positions, mask=positions < length, other=-1)
        valid = (token >= 0) & (token < vocab)
        place = counts_ptr + index * vocab + token
        is_output = positions >= prompt_len
        ones = tl.full((BLOCK,), 1, tl.int32)
        tl.atomic_or(place, ones, mask=valid & (positions < prompt_len), sem="relaxed")
        tl.atomic_add(place, ones + ones, mask=valid & is_output, sem="relaxed")


@triton.jit
def penalise_kernel(
    places_ptr, coefficients_ptr, tokens_ptr, counts_ptr, logits_ptr, tokens_stride, logits_stride, vocab,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (part, penalised row)."""
    part, parts, index = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    row = tl.load(places_ptr + index * 4)
    slot = tl.load(places_ptr + index * 4 + 1)
    length = tl.load(places_ptr + index * 4 + 2)
    repetition = tl.load(coefficients_ptr + index * 3)
    presence = tl.load(coefficients_ptr + index * 3 + 1)
    frequency = tl.load(coefficients_ptr + index * 3 + 2)
    for start in range(part * BLOCK, length, parts * BLOCK):
        positions = start + tl.arange(0, BLOCK)
        token = tl.load(tokens_ptr + slot * tokens_stride + positions, mask=positions < length, other=-1)
        valid = (token >= 0) & (token < vocab)
        # Of all occurrences of a token one gets its count, and the others zero.
        taken = tl.atomic_xchg(
            counts_ptr + index * vocab + token, tl.zeros((BLOCK,), tl.int32), mask=valid, sem="relaxed"
        )
        first = valid & (taken != 0)
        occurrences = (taken >> 1).to(tl.float32)
        x = tl.load(logits_ptr + row * logits_stride + token, mask=first, other=0.0)
        x = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
        x -= occurrences * frequency + tl.where(taken > 1, presence, 0.0)
        tl.store(logits_ptr + row * logits_stride + token, x, mask=first)


def adjustment_arrays(batch: DeviceBatch) -> dict[str, NDArray]:
    """What `adjust_` wants to have on the device; empty if there is nothing to adjust."""
    arrays: dict[str, NDArray] = {}
    if batch.bias_rows.size or batch.masked_rows.size:
        arrays |= _edits(batch)
    if batch.penalties is not None:
        rows = batch.penalties
        # [P, 4]: row, slot, length, prompt length; and [P, 3]
        arrays["penalty_places"] = np.stack((rows.rows, rows.slots, rows.lengths, rows.prompt_lens), axis=1)
        arrays["penalty_coefficients"] = np.stack((rows.repetition, rows.presence, rows.frequency), axis=1)
    return arrays


def _edits(batch: DeviceBatch) -> dict[str, NDArray]:
    """Biases and masks as one list in which no place occurs with two different values, so that its order is free."""
    rows, tokens, values = batch.bias_rows, batch.bias_tokens, batch.bias_values
    if rows.size and batch.masked_rows.size:
        free = ~np.isin(_place(rows, tokens), _place(batch.masked_rows, batch.masked_tokens))
        rows, tokens, values = rows[free], tokens[free], values[free]
    masks = np.full(len(batch.masked_rows), -np.inf, dtype=np.float32)
    return {
        "edit_rows": np.concatenate((rows, batch.masked_rows)).astype(np.int32),
        "edit_tokens": np.concatenate((tokens, batch.masked_tokens)).astype(np.int32),
        "edit_values": np.concatenate((values, masks)),
    }


def _place(rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows << 32 | tokens


def adjust_(logits: Tensor, arrays: dict[str, Tensor], tokens: Tensor) -> None:
    """Change `logits` in place: bias, then masks, then penalties.

    Args:
        logits: [S, vocab] float32; rows may be parts of longer ones.
        arrays: those of `adjustment_arrays`, on the device; others are ignored.
        tokens: [num_slots, length] int32, every slot's sequence; what lies behind a row's length is not read.
    """
    if "edit_rows" in arrays:
        rows = arrays["edit_rows"]
        edit_logits_kernel[(triton.cdiv(len(rows), _BLOCK),)](
            rows, arrays["edit_tokens"], arrays["edit_values"], logits, logits.stride(0), len(rows), BLOCK=_BLOCK
        )
    if "penalty_places" in arrays:
        _penalise_(logits, arrays["penalty_places"], arrays["penalty_coefficients"], tokens)


def _penalise_(logits: Tensor, places: Tensor, coefficients: Tensor, tokens: Tensor) -> None:
    """As `adjustment_arrays` has it: `places` [P, 4] int64 and `coefficients` [P, 3] float32."""
    vocab_size = logits.shape[1]
    grid = (_PROGRAMS, len(places))
    counts = torch.zeros(len(places), vocab_size, dtype=torch.int32, device=logits.device)
    count_tokens_kernel[grid](places, tokens, counts, tokens.stride(0), vocab_size, BLOCK=_BLOCK)
    penalise_kernel[grid](
        places, coefficients, tokens, counts, logits, tokens.stride(0), logits.stride(0), vocab_size, BLOCK=_BLOCK,
        enable_fp_fusion=False,  # the reference rounds after each operation
    )  # fmt: skip
