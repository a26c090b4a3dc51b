"""One token per row from the sums and candidates of `weights.py`, as `kernels/sampling.py` defines it.

Tokens are ordered by weight and then by lower id. What top_k, top_p and min_p keep is the beginning of that order, so a
border describes it: all weights from a threshold on, and the first few ids of those just below it. The border is
found by bisection, without sorting; then the inverse CDF runs over what is kept, in the order of ids.

Nearly always the candidates contain the border, and they are in registers. If they do not, because the row is too flat,
the same bisection reads the row's logits in every round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .argmax import best_of_row, packed_id, packed_value
from .philox import uniform
from .weights import Weights, load_weights, smallest_of_octave


@triton.jit
def mass_of(bits):
    """The int64 weight of a float's bits."""
    return bits.to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def tally(
    threshold, listed, candidates, row_ptr, vocab, maximum, temperature, SCALE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(number, mass) of the weights whose bits are at least `threshold`: of the candidates or of the whole row."""
    if listed:
        above = candidates >= threshold
        count = tl.sum(above.to(tl.int32), 0)
        mass = tl.sum(tl.where(above, mass_of(candidates), 0), 0)
    else:
        counts = tl.zeros((BLOCK,), tl.int32)
        masses = tl.zeros((BLOCK,), tl.int64)
        for start in tl.range(0, vocab, BLOCK, num_stages=3):  # reads ahead
            ids = start + tl.arange(0, BLOCK)
            bits = load_weights(row_ptr, ids, vocab, maximum, temperature, SCALE).to(tl.int32, bitcast=True)
            above = bits >= threshold
            counts += above.to(tl.int32)
            masses += tl.where(above, mass_of(bits), 0)
        count = tl.sum(counts, 0)
        mass = tl.sum(masses, 0)
    return count, mass


@triton.jit
def find_border(
    lowest, count, mass, total, top_k, top_p, listed, candidates, row_ptr, vocab, maximum, temperature,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """The border of top_k and then top_p.

    Args:
        lowest, count, mass: bits that no weight lies below, how many there are, and their sum.
        total: the sum of all weights of the row.

    Returns:
        (threshold, ties): weights whose bits are at least `threshold` are kept, and the first `ties` of those with one
        less.
    """
    # Always: `count` and `mass` are of the weights from `low` on, `count_high` and `mass_high` from `high` on.
    low, high = lowest, lowest * 0 + LARGEST + 1
    count_high, mass_high = count * 0, mass * 0
    ties = count * 0
    if top_k > 0:
        while (count > top_k) & (high - low > 1):
            middle = low + (high - low) // 2
            count_middle, mass_middle = tally(
                middle, listed, candidates, row_ptr, vocab, maximum, temperature, SCALE, BLOCK
            )
            enough = count_middle >= top_k
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
            count, mass = tl.where(enough, count_middle, count), tl.where(enough, mass_middle, mass)
            count_high = tl.where(enough, count_high, count_middle)
            mass_high = tl.where(enough, mass_high, mass_middle)
        if count > top_k:  # equal weights at the border
            ties = top_k - count_high
            total = mass_high + ties * mass_of(low)
            low, count, mass = high, count_high, mass_high
        else:
            total = mass

    # A token stays if those before it hold less than `needed`; not-a-number keeps the first token only.
    needed = total.to(tl.float64) * top_p
    before, weight = mass, mass_of(low - 1)
    if (mass.to(tl.float64) < needed) == 0:
        high, count_high, mass_high = lowest * 0 + LARGEST + 1, count * 0, mass * 0
        while (count - count_high > 1) & (high - low > 1):
            middle = low + (high - low) // 2
            count_middle, mass_middle = tally(
                middle, listed, candidates, row_ptr, vocab, maximum, temperature, SCALE, BLOCK
            )
            less = mass_middle.to(tl.float64) < needed
            low, high = tl.where(less, low, middle), tl.where(less, middle, high)
            count, mass = tl.where(less, count, count_middle), tl.where(less, mass, mass_middle)
            count_high = tl.where(less, count_middle, count_high)
            mass_high = tl.where(less, mass_middle, mass_high)
        if count - count_high > 1:  # equal weights at the border
            ties = count - count_high
            before, weight = mass_high, mass_of(low)
            low = high
        else:  # one weight, and it stays
            ties = count * 0

    # The first of the equal ones after which the mass suffices.
    few, many = ties * 0, ties
    while many - few > 1:
        middle = (few + many) // 2
        less = (before + middle * weight).to(tl.float64) < needed
        few, many = tl.where(less, middle, few), tl.where(less, many, middle)
    # The very first token stays whatever is asked.
    return low, tl.where(low > LARGEST, tl.maximum(many, 1), many)


@triton.jit
def kept_mass(weights, threshold, ties, ties_before, min_weight):
    """int64 weights, zero for what the filters remove; and the number of weights just below the threshold."""
    bits = weights.to(tl.int32, bitcast=True)
    tied = bits == threshold - 1
    rank = ties_before + tl.cumsum(tied.to(tl.int32), 0)
    mass = weights.to(tl.int64)
    kept = ((bits >= threshold) | (tied & (rank <= ties))) & (mass >= min_weight)
    return tl.where(kept, mass, 0), tl.sum(tied.to(tl.int32), 0)


@triton.jit
def target_mass(total, random):
    """The mass that the cumulative weight of the drawn token must exceed."""
    return tl.minimum((total.to(tl.float64) * random).to(tl.int64), total - 1)


@triton.jit
def draw_from_split(
    sums_ptr, min_weight, random, row_ptr, splits, vocab, maximum, temperature,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The inverse CDF over the splits' sums, at `sums_ptr`, and then over the split in which the target lies."""
    indices = tl.arange(0, BLOCK_S)
    sums = tl.load(sums_ptr + indices, mask=indices < splits, other=0)
    target = target_mass(tl.sum(sums, 0), random)
    split = tl.sum((tl.cumsum(sums, 0) <= target).to(tl.int32), 0)
    before = tl.sum(tl.where(indices < split, sums, 0), 0)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    mass = load_weights(row_ptr, ids, vocab, maximum, temperature, SCALE).to(tl.int64)
    mass = tl.where(mass >= min_weight, mass, 0)
    return split * BLOCK + tl.sum((before + tl.cumsum(mass, 0) <= target).to(tl.int32), 0)


@triton.jit
def draw_from_row(
    threshold, ties, min_weight, random, row_ptr, vocab, maximum, temperature, SCALE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The inverse CDF over a whole row: the number of tokens whose cumulative weight does not exceed the target."""
    tied = ties * 0
    total = min_weight * 0
    for start in range(0, vocab, BLOCK):
        weights = load_weights(row_ptr, start + tl.arange(0, BLOCK), vocab, maximum, temperature, SCALE)
        kept, more = kept_mass(weights, threshold, ties, tied, min_weight)
        tied += more
        total += tl.sum(kept, 0)
    target = target_mass(total, random)
    tied = ties * 0
    before = min_weight * 0
    token = ties * 0
    for start in range(0, vocab, BLOCK):
        weights = load_weights(row_ptr, start + tl.arange(0, BLOCK), vocab, maximum, temperature, SCALE)
        kept, more = kept_mass(weights, threshold, ties, tied, min_weight)
        cumulative = before + tl.cumsum(kept, 0)
        token += tl.sum((cumulative <= target).to(tl.int32), 0)
        tied += more
        before += tl.sum(kept, 0)
    return token


@triton.jit
def draw_filtered(
    total, header_ptr, ids_ptr, bits_ptr, top_k, top_p, min_weight, random, row_ptr, vocab, maximum, temperature,
    CAPACITY: tl.constexpr, SCALE: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the row's candidates, at `ids_ptr` and `bits_ptr`, if the border is among them; else from the whole row."""
    octave = tl.load(header_ptr)
    count = tl.load(header_ptr + 1)
    nonzero = tl.load(header_ptr + 2)
    places = tl.arange(0, CAPACITY)
    candidates = tl.load(bits_ptr + places, mask=places < count, other=0)
    mass = tl.sum(mass_of(candidates), 0)
    lowest = smallest_of_octave(octave)
    # Do the candidates reach top_k, or top_p, or everything above `min_weight`?
    sufficient = (mass.to(tl.float64) < total.to(tl.float64) * top_p) == 0
    sufficient = sufficient | (min_weight >= mass_of(lowest))
    sufficient = tl.where(top_k > 0, count >= top_k, sufficient)
    listed = (count == nonzero) | ((count > 0) & sufficient)
    lowest = tl.where(listed, lowest, smallest_of_octave(octave * 0 + 1))
    threshold, ties = find_border(
        lowest, tl.where(listed, count, nonzero), tl.where(listed, mass, total), total, top_k, top_p,
        listed, candidates, row_ptr, vocab, maximum, temperature, SCALE, BLOCK, LARGEST,
    )  # fmt: skip
    if listed:
        kept, _tied = kept_mass(candidates.to(tl.float32, bitcast=True), threshold, ties, 0, min_weight)
        target = target_mass(tl.sum(kept, 0), random)
        token = tl.load(ids_ptr + tl.sum((tl.cumsum(kept, 0) <= target).to(tl.int32), 0))
    else:
        token = draw_from_row(threshold, ties, min_weight, random, row_ptr, vocab, maximum, temperature, SCALE, BLOCK)
    return token


@triton.jit
def draw_kernel(
    logits_ptr, best_ptr, temperature_ptr, filtered_ptr, top_k_ptr, top_p_ptr, min_weight_ptr, seed_ptr, position_ptr,
    sums_ptr, headers_ptr, ids_ptr, bits_ptr, tokens_ptr, stride, vocab, splits,
    CAPACITY: tl.constexpr, SCALE: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per row, greedy rows included. LARGEST: the bits of the largest weight, SCALE."""
    row = tl.program_id(0).to(tl.int64)
    best = best_of_row(best_ptr, row, splits, BLOCK_S)
    temperature = tl.load(temperature_ptr + row)
    token = packed_id(best)
    if temperature > 0.0:
        maximum = packed_value(best)
        row_ptr = logits_ptr + row * stride
        min_weight = tl.load(min_weight_ptr + row)
        random = uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row))
        if tl.load(filtered_ptr + row) == 0:
            token = draw_from_split(
                sums_ptr + row * splits, min_weight, random, row_ptr, splits, vocab, maximum, temperature,
                SCALE, BLOCK, BLOCK_S,
            ).to(tl.int64)  # fmt: skip
        else:
            indices = tl.arange(0, BLOCK_S)
            total = tl.sum(tl.load(sums_ptr + row * splits + indices, mask=indices < splits, other=0), 0)
            token = draw_filtered(
                total, headers_ptr + row * 3, ids_ptr + row * CAPACITY, bits_ptr + row * CAPACITY,
                tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), min_weight, random, row_ptr, vocab, maximum,
                temperature, CAPACITY, SCALE, LARGEST, BLOCK,
            ).to(tl.int64)  # fmt: skip
    tl.store(tokens_ptr + row, token)


def draw(logits: Tensor, best: Tensor, parameters: dict[str, Tensor], weights: Weights) -> Tensor:
    """One token per row of `logits` [S, vocab], [S] int64.

    Args:
        best: from `split_argmax`.
        parameters: those of `Weights.compute` and `top_k` [S] int32, `top_p` [S] float64, `seed` and `position` [S]
            int64.
        weights: computed of the same.
    """
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    draw_kernel[(rows,)](
        logits, best, parameters["temperature"], parameters["filtered"], parameters["top_k"], parameters["top_p"],
        parameters["min_weight"], parameters["seed"], parameters["position"], weights.sums, weights.headers,
        weights.ids, weights.bits, tokens, logits.stride(0), vocab_size, best.shape[1],
        CAPACITY=weights.capacity, SCALE=weights.scale, LARGEST=float_bits(weights.scale), BLOCK=weights.block,
        BLOCK_S=weights.block_s, num_warps=8,
    )  # fmt: skip
    return tokens


def float_bits(power_of_two: float) -> int:
    """The bits of a float32."""
    return (127 + int(power_of_two).bit_length() - 1) << 23
