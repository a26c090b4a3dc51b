"""Random quantised weights, for kernels that are checked or timed."""

from __future__ import annotations

import torch

from ....kernels.quantised_weight import QuantisedWeight


def random_weight(
    outputs: int,
    inputs: int,
    device: torch.device,
    *,
    bits: int = 4,
    group_size: int = 128,
    zeros: bool = False,
    floats: bool = False,
    activations: torch.dtype | None = None,
) -> QuantisedWeight:
    """Its products with random numbers of variance 1 have about that variance. `group_size` 0: a row has one scale."""
    group_size = min(group_size or inputs, inputs)
    groups = -(-inputs // group_size)
    if floats:
        values = torch.randn(outputs, inputs, device=device).to(torch.float8_e4m3fn)
        spread = 1.0
    else:
        values = torch.randint(0, 256, (outputs, inputs * bits // 8), dtype=torch.uint8, device=device)
        spread = (1 << bits) * 0.29  # of the uniform distribution
    scales = (torch.rand(outputs, groups, device=device) + 0.5) * (inputs**-0.5 / spread)
    middle = 1 << (bits - 1)
    return QuantisedWeight(
        values=values,
        scales=scales.bfloat16(),
        zeros=torch.randint(middle - 2, middle + 3, (outputs, groups), dtype=torch.uint8, device=device)
        if zeros
        else None,
        bits=bits,
        group_size=group_size,
        activations=activations,
    )
