"""What requests ask to be changed in their logits before a token is drawn: bias, masked stop tokens, penalties."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclasses.dataclass(slots=True)
class Penalties:
    """P rows with a repetition, presence or frequency penalty, L the length of their longest sequence."""

    rows: IntArray
    """[P] row of the logits."""
    tokens: NDArray[np.int32]
    """[P, L]: every row's sequence; what lies behind its end is not read."""
    lengths: IntArray
    """[P], at least 1."""
    prompt_lens: IntArray
    """[P]: the tokens from here on are output."""
    repetition: FloatArray
    presence: FloatArray
    frequency: FloatArray
    """[P] each; 1, 0 and 0 do nothing."""


@dataclasses.dataclass(slots=True)
class LogitAdjustments:
    """All adjustments of one step as host arrays; entries address the logits as (row, token)."""

    bias_rows: IntArray
    bias_tokens: IntArray
    bias_values: FloatArray
    """[B] each: added to the logit. No (row, token) occurs twice."""
    masked_rows: IntArray
    masked_tokens: IntArray
    """[M] each: set to minus infinity."""
    penalties: Penalties | None

    def apply_(self, logits: Tensor) -> None:
        """Change `logits` [S, vocab] float32 in place: bias, then masks, then penalties."""
        device = logits.device
        if self.bias_rows.size:
            rows, tokens, values = (
                torch.from_numpy(array).to(device) for array in (self.bias_rows, self.bias_tokens, self.bias_values)
            )
            logits[rows, tokens] += values
        if self.masked_rows.size:
            rows, tokens = (torch.from_numpy(array).to(device) for array in (self.masked_rows, self.masked_tokens))
            logits[rows, tokens] = -torch.inf
        if self.penalties is not None:
            _penalise_(logits, self.penalties)


def _penalise_(logits: Tensor, penalties: Penalties) -> None:
    """Penalise what already occurs in the sequences; touches one logit per known token of these rows.

    Repetition (CTRL, arXiv:1909.05858) divides positive and multiplies negative logits of tokens in prompt or
    output. Frequency (per occurrence) and presence (once) subtract and count the output only (OpenAI's definition).
    A token that occurs several times is written several times with the same value, so the order does not matter.
    """
    device = logits.device
    # The rows end to end, so that a long one costs its own length only.
    row_of = np.repeat(np.arange(len(penalties.rows)), penalties.lengths)
    column = np.arange(len(row_of)) - np.repeat(np.cumsum(penalties.lengths) - penalties.lengths, penalties.lengths)
    occurring = penalties.tokens[row_of, column].astype(np.int64)
    is_output = column >= penalties.prompt_lens[row_of]

    vocab = logits.shape[1]
    rows = torch.from_numpy(row_of).to(device)
    tokens = torch.from_numpy(occurring).to(device)
    repetition, presence, frequency = (
        torch.from_numpy(array).to(device)[rows]
        for array in (penalties.repetition, penalties.presence, penalties.frequency)
    )
    counts = torch.zeros(len(penalties.rows) * vocab, device=device)
    counts.index_add_(0, rows * vocab + tokens, torch.from_numpy(is_output.astype(np.float32)).to(device))
    occurrences = counts[rows * vocab + tokens]

    where = torch.from_numpy(penalties.rows).to(device)[rows], tokens
    values = logits[where]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= occurrences * frequency + (occurrences > 0) * presence
    logits[where] = values
