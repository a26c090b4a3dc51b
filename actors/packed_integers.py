"""Integers of a few bits in the 32-bit words of a checkpoint.

They follow one another without gaps, the lowest bits of a word first, across words where they do not come out even: 32
integers fill as many words as they have bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.quantised_weight import unpack_nibbles

PER_RUN = 32
"""Integers that fill whole words, whatever their bits."""


def words_of(integers: slice, bits: int) -> slice:
    """The words that hold these integers, from the beginning of a run."""
    return slice(integers.start // PER_RUN * bits, num_words(integers.stop, bits))


def num_words(integers: int, bits: int) -> int:
    """Words that this many integers take."""
    return -(-integers * bits // 32)


def unpack(words: Tensor, bits: int, integers: slice) -> Tensor:
    """The integers that `words_of` found.

    Args:
        words: [rows, words] int32.

    Returns:
        [rows, integers] uint8.
    """
    skipped = integers.start % PER_RUN
    return _unpack_all(words, bits)[:, skipped : skipped + integers.stop - integers.start]


def nibbles(words: Tensor, integers: slice) -> Tensor | None:
    """Integers of 4 bits without unpacking them: [rows, integers / 2] uint8, the first of two in the low half; None
    where the range begins or ends between two."""
    if integers.start % 2 or integers.stop % 2:
        return None
    first = integers.start % PER_RUN // 2
    return words.contiguous().view(torch.uint8)[:, first : first + (integers.stop - integers.start) // 2]


def _unpack_all(words: Tensor, bits: int) -> Tensor:
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    if bits == 4:
        return unpack_nibbles(octets)
    rows, width = words.shape
    runs = torch.nn.functional.pad(words, (0, -width % bits)).unflatten(1, (-1, bits)).long() & 0xFFFFFFFF
    unpacked = torch.empty((rows, runs.shape[1], PER_RUN), dtype=torch.uint8, device=words.device)
    for index in range(PER_RUN):
        word, shift = divmod(index * bits, 32)
        value = runs[..., word] >> shift
        if shift + bits > 32:
            value |= runs[..., word + 1] << (32 - shift)
        unpacked[..., index] = value & ((1 << bits) - 1)
    return unpacked.flatten(1)
