"""Random weights of the right shapes, for measuring a model whose weights nobody has: `load_format = "dummy"`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cluster.quantisation import Layout, Quantisation, Scheme
from ..kernels.quantised_weight import QuantisedWeight, Weight, stack_weights
from .column_groups import StoredGroups, quantised_weight
from .quantised_layouts import ACTIVATIONS
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


class DummyQuantised:
    """See `QuantisedSource`."""

    def __init__(self, quantisation: Quantisation | None, dtype: torch.dtype, device: torch.device) -> None:
        self._quantisation = quantisation
        self._dtype, self._device = dtype, device

    def plan(
        self,
        stacks: Sequence[list[TensorSlice]],
        place: Callable[[list[Weight]], None],
        *,
        only_if_stored_so: bool = False,
    ) -> bool:
        """See `QuantisedSource`; `place` is called at once. What may be unquantised is."""
        if self._quantisation is None or only_if_stored_so:
            return False
        schemes = [
            [self._quantisation.scheme(piece.name.removesuffix(".weight")) for piece in stack] for stack in stacks
        ]
        if not any(scheme is not None for stack in schemes for scheme in stack):
            return False
        weights = []
        for stack, its_schemes in zip(stacks, schemes, strict=True):
            parts = [self._part(piece, scheme) for piece, scheme in zip(stack, its_schemes, strict=True)]
            weights.append(stack_weights(parts, stack[0].num_columns or 0, self._dtype))
        place(weights)
        return True

    def _part(self, piece: TensorSlice, scheme: Scheme | None) -> Weight:
        if scheme is not None:
            return _random_quantised(piece, scheme, self._dtype, self._device)
        target = torch.empty(piece.size, dtype=self._dtype, device=self._device)
        fill_randomly(target, [piece])
        return target


def _random_quantised(piece: TensorSlice, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> QuantisedWeight:
    """Integers that are all equally likely, or normally distributed floats, with equal scales."""
    (out, inputs), first = piece.size, piece.columns.start if piece.columns is not None else 0
    generator = torch.Generator(device)
    generator.manual_seed(zlib.crc32(f"{piece.name} {piece.rows} {piece.columns}".encode()))
    group_size = min(scheme.group_size or piece.shape[1], piece.shape[1])
    columns = torch.arange(first, first + inputs)
    groups = (out, int(columns[-1]) // group_size - first // group_size + 1)
    if scheme.is_float:
        values = torch.randn((out, inputs), generator=generator, device=device).to(torch.float8_e4m3fn)
        scale, scale_dtype = STANDARD_DEVIATION, torch.float32
    else:
        values = torch.randint(
            0, 1 << scheme.bits, (out, inputs), generator=generator, device=device, dtype=torch.uint8
        )
        scale = STANDARD_DEVIATION / ((1 << scheme.bits) / 12**0.5)
        packed = scheme.layout in (Layout.PACKED, Layout.PLAIN)
        scale_dtype = torch.float16 if not packed or dtype == torch.float32 else dtype
    zeros = None
    if not scheme.symmetric:
        zeros = torch.full(groups, (1 << (scheme.bits - 1)) - 1, dtype=torch.uint8, device=device)
    return quantised_weight(
        StoredGroups(
            values=values,
            scales=torch.full(groups, scale, dtype=scale_dtype, device=device),
            zeros=zeros,
            bits=scheme.bits,
            group_size=group_size,
            first_column=first % group_size,
            group_of=(columns // group_size - first // group_size).flip(0) if scheme.act_order else None,
            activations=ACTIVATIONS[scheme.activations],
        )
    )


def _is_norm(slices: list[TensorSlice]) -> bool:
    """A vector is a norm's weight or a bias."""
    return slices[0].num_columns is None and slices[0].name.endswith(".weight")
