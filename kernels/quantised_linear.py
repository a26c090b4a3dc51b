"""Products with quantised weights in plain torch: what the other implementations are to compute."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .quantised_weight import QuantisedWeight, quantise_activations


class QuantisedLinear:
    """See `interface.Linear`. The weight stays small: every call expands it anew, in float32."""

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None = None) -> None:
        self.weight = weight
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        return self.float32(x).to(x.dtype)

    def float32(self, x: Tensor) -> Tensor:
        """See `interface.Linear`."""
        weight = self.weight
        wide = (x if weight.order is None else x[:, weight.order]).float()
        if weight.activations is not None:
            rounded, scales = quantise_activations(wide, weight.activations, weight.group_size)
            wide = rounded.float() * scales.repeat_interleave(weight.group_size, 1)[:, : wide.shape[1]]
        return functional.linear(wide, weight.dequantise(torch.float32), self._bias)

    def add_to(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """See `interface.Linear`."""
        hidden.add_(self(x), alpha=alpha)
