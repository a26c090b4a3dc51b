"""Random quantised weights, and the product that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from raytroupe.kernels.quantised_weight import QuantisedWeight, pack_nibbles


def random_weight(
    generator: torch.Generator,
    outputs: int,
    inputs: int,
    *,
    bits: int = 4,
    group: int = 32,
    zeros: bool = False,
    floats: bool = False,
    activations: torch.dtype | None = None,
    ordered: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantisedWeight:
    """With scales that keep results near 1; the ends of the range of values are among them."""
    group = min(group, inputs)
    groups = -(-inputs // group)
    spread = 0.29 * (1 << bits)  # of a uniform distribution
    if floats:
        values = torch.randn(outputs, inputs, generator=generator).to(torch.float8_e4m3fn)
        spread = 1.0
    else:
        values = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
        values[0, :2] = torch.tensor([0, (1 << bits) - 1], dtype=torch.uint8)
        values = pack_nibbles(values) if bits == 4 else values
    scales = (torch.rand(outputs, groups, generator=generator) + 0.5) * inputs**-0.5 / spread
    return QuantisedWeight(
        values=values,
        scales=scales.to(scale_dtype),
        zeros=torch.randint(0, 1 << bits, (outputs, groups), generator=generator, dtype=torch.uint8) if zeros else None,
        bits=bits,
        group_size=group,
        activations=activations,
        order=torch.randperm(inputs, generator=generator) if ordered else None,
    )


def exact_product(weight: QuantisedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float64, activations as they are."""
    columns = x if weight.order is None else x[:, weight.order]
    y = columns.double() @ weight.dequantise(torch.float64).t()
    return y if bias is None else y + bias.double()
