"""A row's logits as integer weights, their sums, and the few largest of them in a list of their own.

The weights are those of `kernels/sampling.py`: exp((x - max) / temperature) in fixed point, at most 2**bits. As floats
they are whole numbers with 24 significant bits, so a float32 holds one exactly, and the bits of floats order like them.

Whatever filters a row must find a border among its weights. For that, weights are counted by octave, the power of two
below them; octaves are taken from the top as long as they fit into `CANDIDATES`, and what they hold is listed by id:

    octave       44   43   42   41  …   1    0: weight zero
    tokens        1    3   40  900  … 5000
                  └── candidates ──┘
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .argmax import best_of_row, finite, packed_value, split_size, warps

CANDIDATES = 2048
"""Of a row at most; a power of two. One program keeps them in registers: 8 for each of 256 threads."""
OCTAVES = tl.constexpr(64)
"""More than there are: weights have 44 bits."""
_ONE = tl.constexpr(127)
"""The exponent field of the float32 1.0."""


def weight_bits(vocab_size: int) -> int:
    """As the reference's: a weight with a token id beside it, and a sum of weights, fit in 63 bits."""
    return min(44, 62 - max(1, (vocab_size - 1).bit_length()))


@triton.jit
def load_weights(row_ptr, ids, vocab, maximum, temperature, SCALE: tl.constexpr):
    """Weights of the tokens `ids`, float32; zero behind the vocabulary. The same bits wherever it is called."""
    mask = ids < vocab
    x = finite(tl.load(row_ptr + ids, mask=mask, other=0.0))
    weights = tl.floor(tl.exp(tl.div_rn(x - maximum, temperature)) * SCALE)
    return tl.where(mask, weights, 0.0)


@triton.jit
def octave(weights):
    """int32: 0 for a weight of zero, else 1 + the power of two below it."""
    return tl.maximum((weights.to(tl.int32, bitcast=True) >> 23) - (_ONE - 1), 0)


@triton.jit
def smallest_of_octave(number):
    """The bits of the least float32 in an octave from 1 on."""
    return (number + (_ONE - 1)) << 23


@triton.jit
def sum_weights_kernel(
    logits_ptr, best_ptr, temperature_ptr, filtered_ptr, min_weight_ptr, sums_ptr, octaves_ptr, stride, vocab,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (split, row), of rows drawn at random: the split's sum. If top_k or top_p filter the row, also the tokens
    in its octaves; else the sum is of what min_p leaves."""
    split, splits, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0.0:
        maximum = packed_value(best_of_row(best_ptr, row, splits, BLOCK_S))
        ids = split * BLOCK + tl.arange(0, BLOCK)
        weights = load_weights(logits_ptr + row * stride, ids, vocab, maximum, temperature, SCALE)
        mass = weights.to(tl.int64)
        if tl.load(filtered_ptr + row) != 0:
            counts = tl.histogram(octave(weights), OCTAVES)
            tl.store(octaves_ptr + (row * splits + split) * OCTAVES + tl.arange(0, OCTAVES), counts)
        else:
            mass = tl.where(mass >= tl.load(min_weight_ptr + row), mass, 0)
        tl.store(sums_ptr + row * splits + split, tl.sum(mass, 0))


@triton.jit
def list_candidates_kernel(
    logits_ptr, best_ptr, temperature_ptr, filtered_ptr, octaves_ptr, headers_ptr, ids_ptr, bits_ptr, stride, vocab,
    CAPACITY: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (split, row), of filtered rows: write the split's candidates behind those of the splits before it.

    A row's header: the lowest octave that is listed, the number of candidates, and of weights that are not zero.
    """
    split, splits, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    if tl.load(filtered_ptr + row) != 0:
        octaves, indices = tl.arange(0, OCTAVES), tl.arange(0, BLOCK_S)
        counts = tl.load(
            octaves_ptr + (row * splits + indices[:, None]) * OCTAVES + octaves[None, :],
            mask=(indices < splits)[:, None] & (octaves > 0)[None, :],
            other=0,
        )
        from_here_up = tl.cumsum(tl.sum(counts, 0), 0, reverse=True)
        lowest = tl.maximum(tl.sum((from_here_up > CAPACITY).to(tl.int32), 0), 1)
        listed = tl.sum(tl.where((octaves >= lowest)[None, :], counts, 0), 1)  # per split
        if split == 0:
            tl.store(headers_ptr + row * 3, lowest)
            tl.store(headers_ptr + row * 3 + 1, tl.sum(listed, 0))
            tl.store(headers_ptr + row * 3 + 2, tl.max(from_here_up, 0))
        if tl.sum(tl.where(indices == split, listed, 0), 0) > 0:
            maximum = packed_value(best_of_row(best_ptr, row, splits, BLOCK_S))
            temperature = tl.load(temperature_ptr + row)
            ids = split * BLOCK + tl.arange(0, BLOCK)
            weights = load_weights(logits_ptr + row * stride, ids, vocab, maximum, temperature, SCALE)
            wanted = octave(weights) >= lowest
            before = tl.sum(tl.where(indices < split, listed, 0), 0)
            place = row * CAPACITY + before + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(ids_ptr + place, ids, mask=wanted)
            tl.store(bits_ptr + place, weights.to(tl.int32, bitcast=True), mask=wanted)


class Weights:
    """Memory for the sums and candidates of `max_rows` rows; what it holds is valid until the next step."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device, capacity: int = CANDIDATES) -> None:
        """`capacity`: candidates of a row at most, a power of two."""
        self.block = split_size(vocab_size)
        splits = triton.cdiv(vocab_size, self.block)
        self.block_s = triton.next_power_of_2(splits)
        self.scale = 2.0 ** weight_bits(vocab_size)
        self.capacity = capacity
        self.sums = torch.empty(max_rows, splits, dtype=torch.int64, device=device)
        """[max_rows, splits]"""
        self.octaves = torch.empty(max_rows, splits, OCTAVES.value, dtype=torch.int32, device=device)
        self.headers = torch.empty(max_rows, 3, dtype=torch.int32, device=device)
        self.ids = torch.empty(max_rows, capacity, dtype=torch.int32, device=device)
        self.bits = torch.empty(max_rows, capacity, dtype=torch.int32, device=device)

    def compute(self, logits: Tensor, best: Tensor, parameters: dict[str, Tensor], *, any_filtered: bool) -> None:
        """Sum and list what is wanted of `logits` [S, vocab].

        Args:
            best: from `split_argmax`.
            parameters: `temperature` [S] float32, zero for greedy rows; `filtered` [S] int32; `min_weight` [S] int64.
        """
        rows, vocab_size = logits.shape
        grid = (best.shape[1], rows)
        constants = {"SCALE": self.scale, "BLOCK": self.block, "BLOCK_S": self.block_s, "num_warps": warps(self.block)}
        temperature, filtered = parameters["temperature"], parameters["filtered"]
        sum_weights_kernel[grid](
            logits, best, temperature, filtered, parameters["min_weight"], self.sums, self.octaves, logits.stride(0),
            vocab_size, **constants,
        )  # fmt: skip
        if any_filtered:
            list_candidates_kernel[grid](
                logits, best, temperature, filtered, self.octaves, self.headers, self.ids, self.bits, logits.stride(0),
                vocab_size, CAPACITY=self.capacity, **constants,
            )  # fmt: skip
