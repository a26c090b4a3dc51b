"""From logits to tokens on the device, for all rows of a step, without waiting for it; see `kernels/sampling.py`.

    raw logits ──▶ log-probabilities to report                                         logprobs.py
        │
        ▼
    bias, masks, penalties, in place                                                   logits.py
        │
        ▼
    largest of every split ──▶ largest of the row                                      argmax.py   greedy rows
        │
        ▼
    sums of integer weights ──▶ inverse CDF                                            weights.py  random rows
        └──▶ candidates ──▶ border of top_k, top_p, min_p ──▶ inverse CDF              draw.py     with a filter

What is launched depends on what the rows ask for, which the host knows; grids depend on shapes only. A row's token and
log-probabilities are a function of its own logits, parameters and position, bit for bit, in any batch: whatever is
added up is an integer, or cut the same way in every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..sampling import MIN_TEMPERATURE
from ..uploads import Uploads
from .argmax import argmax, split_argmax
from .draw import draw
from .logits import adjust_, adjustment_arrays
from .logprobs import LogProbabilities, Reported
from .sampling_batch import DeviceBatch, PenalisedRows
from .weights import CANDIDATES, Weights, weight_bits

__all__ = ["DeviceBatch", "DeviceSampler", "DeviceSamples", "PenalisedRows"]

_FLOAT_MAX = float(np.finfo(np.float32).max)
_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceSamples:
    """The outcome for S rows, A of which report log-probabilities; in memory of its own."""

    tokens: Tensor
    """[S] int64."""
    reported: Reported | None = None
    """None: no row reports any."""

    def map(self, function: Callable[[Tensor], Tensor]) -> DeviceSamples:
        """The same with `function` of every tensor: one that starts a copy to the host, for example."""
        reported = self.reported
        if reported is not None:
            reported = dataclasses.replace(
                reported,
                chosen=function(reported.chosen),
                top_ids=function(reported.top_ids),
                top_logprobs=function(reported.top_logprobs),
            )
        return DeviceSamples(function(self.tokens), reported)

    def reports(self) -> list[tuple[float, list[tuple[int, float]]] | None] | None:
        """As `kernels.sampling.SampledTokens.logprobs`; only of tensors on the host."""
        return None if self.reported is None else self.reported.entries()


class DeviceSampler:
    """The sampler of one stream of steps. It keeps memory for sums and candidates: 25 KiB a row for 128k tokens."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device, candidates: int = CANDIDATES) -> None:
        """`candidates`: see `weights.py`; results do not depend on it."""
        self._vocab_size = vocab_size
        self._weights = Weights(vocab_size, max_rows, device, candidates)

    def sample(self, logits: Tensor, batch: DeviceBatch | None, tokens: Tensor, uploads: Uploads) -> DeviceSamples:
        """Choose one token per row.

        Args:
            logits: [S, vocab] float32, S at most `max_rows`; rows may be parts of longer ones. Overwritten if the batch
                has adjustments.
            batch: parameters of the rows; None: all rows are greedy, report nothing and adjust nothing.
            tokens: [num_slots, max_model_len + 1] int32, what is known of every slot's sequence; read for penalties.
            uploads: used once, if there is a batch.
        """
        if batch is None:
            return DeviceSamples(argmax(logits))

        asked = np.flatnonzero(batch.logprobs >= 0)
        parameters = _parameters(batch, self._vocab_size)
        adjustments = adjustment_arrays(batch)
        overwritten = bool(adjustments) and bool(np.isin(asked, _adjusted_rows(batch)).any())
        arrays = parameters | adjustments
        if asked.size:
            arrays["reported"] = asked.astype(np.int32)
        if overwritten:
            arrays["copied"] = np.arange(len(asked), dtype=np.int32)
        on_device = uploads(arrays)

        logprobs = None
        if asked.size:
            # Of the model's distribution, so of logits that nothing will change.
            reported = on_device["reported"]
            if overwritten:
                # As far apart as the rows themselves, so that the same compiled kernels serve both.
                stride = max(logits.stride(0), self._vocab_size)
                copies = torch.empty(len(asked), stride, device=logits.device)[:, : self._vocab_size]
                torch.index_select(logits, 0, reported, out=copies)
                logprobs = LogProbabilities(copies, on_device["copied"])
            else:
                logprobs = LogProbabilities(logits, reported)
        adjust_(logits, on_device, tokens)

        chosen = self._choose(logits, parameters, on_device)
        if logprobs is None:
            return DeviceSamples(chosen)
        top = logprobs.top(min(self._vocab_size, int(batch.logprobs.max())))
        return DeviceSamples(chosen, Reported(batch.logprobs, logprobs.chosen(chosen, on_device["reported"]), *top))

    def _choose(self, logits: Tensor, parameters: dict[str, NDArray], on_device: dict[str, Tensor]) -> Tensor:
        """Tokens of adjusted logits."""
        if not parameters["temperature"].any():
            return argmax(logits)
        best = split_argmax(logits, on_device["temperature"])
        self._weights.compute(logits, best, on_device, any_filtered=bool(parameters["filtered"].any()))
        return draw(logits, best, on_device, self._weights)


def _parameters(batch: DeviceBatch, vocab_size: int) -> dict[str, NDArray]:
    """What the kernels read of every row."""
    temperature = np.nan_to_num(batch.temperature)
    drawn = temperature >= MIN_TEMPERATURE
    min_p = np.clip(np.nan_to_num(batch.min_p), 0.0, 1.0)
    return {
        "temperature": np.where(drawn, np.minimum(temperature, _FLOAT_MAX), 0.0).astype(np.float32),
        "filtered": (drawn & ~((batch.top_k <= 0) & (batch.top_p >= 1.0))).astype(np.int32),
        "top_k": np.clip(batch.top_k, 0, _INT32_MAX).astype(np.int32),
        "top_p": batch.top_p,
        "min_weight": (min_p * 2.0 ** weight_bits(vocab_size)).astype(np.int64),
        "seed": batch.seed.view(np.int64),
        "position": batch.position,
    }


def _adjusted_rows(batch: DeviceBatch) -> NDArray[np.int64]:
    penalised = batch.penalties.rows if batch.penalties is not None else np.zeros(0, dtype=np.int64)
    return np.concatenate((batch.bias_rows, batch.masked_rows, penalised))
