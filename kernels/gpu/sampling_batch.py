"""What the device must be told about a step's rows to sample them; names no token that the host may not know yet."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclasses.dataclass(slots=True)
class PenalisedRows:
    """P rows with a repetition, presence or frequency penalty. Their tokens are read from the device's token table."""

    rows: IntArray
    """[P] row of the logits; none occurs twice."""
    slots: IntArray
    """[P] row of the token table."""
    lengths: IntArray
    """[P] known tokens."""
    prompt_lens: IntArray
    """[P]: the tokens from here on are output."""
    repetition: FloatArray
    presence: FloatArray
    frequency: FloatArray
    """[P] each; 1, 0 and 0 do nothing."""


@dataclasses.dataclass(slots=True)
class DeviceBatch:
    """The sampling parameters of S rows, on the host. The counterpart of `kernels.sampling.SamplingBatch`."""

    temperature: NDArray[np.float64]
    top_p: NDArray[np.float64]
    top_k: IntArray
    """0: no limit."""
    min_p: NDArray[np.float64]
    seed: NDArray[np.uint64]
    position: IntArray
    """Of the token to be sampled, in its sequence: with the seed it gives the row's random number."""
    logprobs: IntArray
    """Alternatives to report; 0: the chosen token only; -1: nothing."""
    bias_rows: IntArray
    bias_tokens: IntArray
    bias_values: FloatArray
    """[B] each: added to the logit; finite. No (row, token) occurs twice."""
    masked_rows: IntArray
    masked_tokens: IntArray
    """[M] each: set to minus infinity."""
    penalties: PenalisedRows | None

    def __len__(self) -> int:
        return len(self.temperature)
