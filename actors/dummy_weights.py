"""Random weights of the right shapes, for measuring a model whose weights nobody has: `load_format = "dummy"`."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from .weight_names import TensorSlice

STANDARD_DEVIATION = 0.02
"""As transformers initialises matrices: activations and logits stay in the range of a trained model's."""


def fill_randomly(target: Tensor, slices: list[TensorSlice]) -> None:
    """Give a weight values where it lies, in its own dtype: norms are 1, all else is normally distributed.

    The values depend on the names and the ranges of the slices, the device and the dtype. So a tensor that several
    shards hold is the same on all of them.

    Args:
        target: the slices stacked along the first dimension; rows beyond them (padding of the vocabulary) become zero.
    """
    if _is_norm(slices):
        target.fill_(1.0)
        return
    generator = torch.Generator(target.device)
    start = 0
    for piece in slices:
        generator.manual_seed(zlib.crc32(f"{piece.name} {piece.rows} {piece.columns}".encode()))
        target[start : start + piece.num_rows].normal_(0.0, STANDARD_DEVIATION, generator=generator)
        start += piece.num_rows
    target[start:].zero_()


def _is_norm(slices: list[TensorSlice]) -> bool:
    """A vector is a norm's weight or a bias."""
    return slices[0].num_columns is None and slices[0].name.endswith(".weight")
