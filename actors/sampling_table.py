"""The sampling parameters of every slot as arrays, so that a step's batch is one indexed read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..cluster.request import SamplingParams
from ..kernels.gpu.sampling_batch import DeviceBatch, PenalisedRows
from ..kernels.logit_adjustments import LogitAdjustments, Penalties
from ..kernels.philox import uniforms
from ..kernels.sampling import SamplingBatch

_ROW = np.dtype(
    [
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("top_k", np.int64),
        ("min_p", np.float64),
        ("seed", np.uint64),
        ("logprobs", np.int64),
        ("min_tokens", np.int64),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("prompt_len", np.int64),
        ("edited", np.bool_),  # has a bias or stop tokens to mask
        ("penalised", np.bool_),
    ],
    align=True,
)
_INT32_MAX = 2**31 - 1
_NO_IDS = np.zeros(0, dtype=np.int64)
_NO_VALUES = np.zeros(0, dtype=np.float32)


class SamplingTable:
    """Parameters by slot. Ranges are the ingress's business; here no value that fits its type may raise."""

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows = np.zeros(num_slots, dtype=_ROW)
        self._plain = np.zeros(num_slots, dtype=np.bool_)
        """Rows that are greedy, report nothing and adjust nothing."""
        self._bias_tokens = [_NO_IDS] * num_slots
        self._bias_values = [_NO_VALUES] * num_slots
        self._stop_tokens = [_NO_IDS] * num_slots

    def set(self, slot: int, params: SamplingParams, prompt_len: int) -> None:
        """Give the slot to a sequence with these parameters. Ids outside of the vocabulary are ignored."""
        vocab_size = self._vocab_size
        bias = {token: value for token, value in params.logit_bias.items() if 0 <= token < vocab_size}
        self._bias_tokens[slot] = np.fromiter(bias.keys(), np.int64, len(bias))
        self._bias_values[slot] = _float32(np.fromiter(bias.values(), np.float64, len(bias)))
        stops = [token for token in params.stop_token_ids if 0 <= token < vocab_size] if params.min_tokens > 0 else []
        self._stop_tokens[slot] = np.array(stops, dtype=np.int64)

        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        row = self._rows[slot]
        row["temperature"], row["top_p"], row["min_p"] = params.temperature, params.top_p, params.min_p
        row["top_k"] = min(max(params.top_k, 0), _INT32_MAX)
        row["seed"] = params.seed % 2**64
        row["logprobs"] = -1 if params.logprobs is None else min(max(params.logprobs, 0), vocab_size)
        row["min_tokens"] = min(max(params.min_tokens, 0), _INT32_MAX)
        row["repetition"], row["presence"], row["frequency"] = _float32(np.array(penalties, dtype=np.float64))
        row["prompt_len"] = prompt_len
        row["edited"] = bool(bias) or bool(stops)
        row["penalised"] = penalties != (1.0, 0.0, 0.0)
        self._plain[slot] = params.greedy and params.logprobs is None and not (row["edited"] or row["penalised"])

    def batch(
        self, slots: NDArray[np.int64], lengths: NDArray[np.int64], tokens: NDArray[np.int32]
    ) -> SamplingBatch | None:
        """What the sampler must know of S rows whose next token is to be sampled.

        Args:
            slots: [S].
            lengths: [S] known tokens of each, which is the position of the sampled token.
            tokens: [num_slots, max_model_len] the slots' tokens.

        Returns:
            None if all rows are greedy, report nothing and adjust nothing.
        """
        if self._plain[slots].all():
            return None
        rows = self._rows[slots]
        return SamplingBatch(
            temperature=rows["temperature"],
            top_p=rows["top_p"],
            top_k=rows["top_k"],
            min_p=rows["min_p"],
            uniform=uniforms(rows["seed"], lengths),
            logprobs=rows["logprobs"],
            adjustments=self._adjustments(rows, slots, lengths, tokens),
        )

    def device_batch(self, slots: NDArray[np.int64], lengths: NDArray[np.int64]) -> DeviceBatch | None:
        """The same for a sampler on the device, where the tokens are; reads none.

        Args:
            slots: [S].
            lengths: [S] known tokens of each, which is the position of the sampled token.

        Returns:
            None if all rows are greedy, report nothing and adjust nothing.
        """
        if self._plain[slots].all():
            return None
        rows = self._rows[slots]
        bias_rows, bias_tokens, bias_values, masked_rows, masked_tokens = self._edits(rows, slots, lengths)
        return DeviceBatch(
            temperature=rows["temperature"],
            top_p=rows["top_p"],
            top_k=rows["top_k"],
            min_p=rows["min_p"],
            seed=rows["seed"],
            position=lengths,
            logprobs=rows["logprobs"],
            bias_rows=bias_rows,
            bias_tokens=bias_tokens,
            bias_values=bias_values,
            masked_rows=masked_rows,
            masked_tokens=masked_tokens,
            penalties=_penalised(rows, slots, lengths),
        )

    def _adjustments(
        self, rows: NDArray, slots: NDArray[np.int64], lengths: NDArray[np.int64], tokens: NDArray[np.int32]
    ) -> LogitAdjustments | None:
        if not rows["penalised"].any() and not rows["edited"].any():
            return None
        penalised = _penalised(rows, slots, lengths)
        return LogitAdjustments(
            *self._edits(rows, slots, lengths),
            penalties=None if penalised is None else _with_tokens(penalised, tokens),
        )

    def _edits(
        self, rows: NDArray, slots: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Rows, tokens and values of the biases; rows and tokens of what is masked."""
        edited = np.flatnonzero(rows["edited"])
        generated = lengths - rows["prompt_len"]
        masked = edited[generated[edited] < rows["min_tokens"][edited]]
        bias_rows, bias_tokens = _flatten(edited, [self._bias_tokens[slot] for slot in slots[edited]])
        bias_values = np.concatenate([_NO_VALUES, *(self._bias_values[slot] for slot in slots[edited])])
        masked_rows, masked_tokens = _flatten(masked, [self._stop_tokens[slot] for slot in slots[masked]])
        return bias_rows, bias_tokens, bias_values, masked_rows, masked_tokens


def _penalised(rows: NDArray, slots: NDArray[np.int64], lengths: NDArray[np.int64]) -> PenalisedRows | None:
    penalised = np.flatnonzero(rows["penalised"])
    if not penalised.size:
        return None
    chosen = rows[penalised]
    return PenalisedRows(
        rows=penalised,
        slots=slots[penalised],
        lengths=lengths[penalised],
        prompt_lens=chosen["prompt_len"],
        repetition=np.ascontiguousarray(chosen["repetition"]),
        presence=np.ascontiguousarray(chosen["presence"]),
        frequency=np.ascontiguousarray(chosen["frequency"]),
    )


def _with_tokens(penalised: PenalisedRows, tokens: NDArray[np.int32]) -> Penalties:
    return Penalties(
        rows=penalised.rows,
        tokens=tokens[penalised.slots, : int(penalised.lengths.max())],
        lengths=penalised.lengths,
        prompt_lens=penalised.prompt_lens,
        repetition=penalised.repetition,
        presence=penalised.presence,
        frequency=penalised.frequency,
    )


def _flatten(rows: NDArray[np.int64], ids: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, ids of the row) pairs to two arrays of equal length."""
    if not ids:
        return _NO_IDS, _NO_IDS
    return np.repeat(rows, [len(row_ids) for row_ids in ids]), np.concatenate(ids)


def _float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """To float32; a magnitude beyond its range becomes the largest it has."""
    largest = float(np.finfo(np.float32).max)
    return np.clip(values, -largest, largest).astype(np.float32)
