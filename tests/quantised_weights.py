"""Random quantised weights of any kind."""

from __future__ import annotations

import torch

from raytroupe.kernels.quantised_weight import QuantisedWeight, pack_nibbles


def random_quantised(
    outputs: int,
    inputs: int,
    generator: torch.Generator,
    *,
    bits: int = 4,
    group_size: int = 0,
    zeros: bool = False,
    scales: torch.dtype = torch.bfloat16,
    activations: torch.dtype | None = None,
    ordered: bool = False,
) -> QuantisedWeight:
    """Scales are powers of two, so that products with small integers are exact. `group_size` 0: the whole row."""
    group_size = group_size or inputs
    shape = (outputs, -(-inputs // group_size))
    integers = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, generator=generator)
    return QuantisedWeight(
        pack_nibbles(integers) if bits == 4 else integers,
        torch.randint(-6, -2, shape, generator=generator).float().exp2().to(scales),
        torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator) if zeros else None,
        bits,
        group_size,
        activations,
        torch.randperm(inputs, generator=generator) if ordered else None,
    )
