"""The decoder's products with quantised weights; see `interface.Linear` and `interface.Kernels.gated_linear`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..quantised_weight import QuantisedWeight
from .eight_bit_linear import EightBitProduct, can_multiply
from .quantised_activations import round_activations
from .quantised_layout import Workspace, pack
from .quantised_linear import QuantisedConfig, QuantisedProduct


class Product(Protocol):
    """x weightᵀ + bias, possibly gated."""

    outputs: int

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""

    def __call__(self, x: Tensor, out: Tensor, alpha: float | None = None) -> None:
        """The product into `out` [T, outputs], or added to it times `alpha`."""


class RearrangedProduct:
    """A product of x's columns in the weight's order, or of rounded activations that no kernel multiplies in 8 bits."""

    def __init__(self, weight: QuantisedWeight, product: Product) -> None:
        self._order, self._product = weight.order, product
        self._activations, self._group_size = weight.activations, weight.group_size
        self.outputs = product.outputs

    @property
    def nbytes(self) -> int:
        """See `Product`."""
        return self._product.nbytes + (0 if self._order is None else self._order.nbytes)

    def __call__(self, x: Tensor, out: Tensor, alpha: float | None = None) -> None:
        """See `Product`."""
        if self._activations is not None:
            x, _ = round_activations(x, self._activations, self._group_size, order=self._order, expanded=True)
        elif self._order is not None:
            x = x.index_select(1, self._order)
        self._product(x, out, alpha)


def new_product(
    weight: QuantisedWeight,
    bias: Tensor | None,
    activation: str | None,
    workspace: Workspace,
    *,
    float8: bool,
    config: QuantisedConfig | None = None,
) -> Product:
    """The product for a weight.

    Args:
        float8: whether the GPU multiplies float8.
        config: of a product whose activations stay as they are; None: that of `tuning.json`.
    """
    if can_multiply(weight, float8=float8):
        return EightBitProduct(weight, bias, activation)
    product = QuantisedProduct(pack(weight), bias, activation, workspace, config)
    if weight.order is None and weight.activations is None:
        return product
    return RearrangedProduct(weight, product)


class TritonQuantisedLinear:
    """See `interface.Linear`."""

    def __init__(self, product: Product) -> None:
        self._product = product

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), self._product.outputs)
        self._product(x, out)
        return out

    def float32(self, x: Tensor) -> Tensor:
        """See `interface.Linear`; never rounded to x's dtype on a GPU."""
        out = x.new_empty(len(x), self._product.outputs, dtype=torch.float32)
        self._product(x, out)
        return out

    def add_to(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """See `interface.Linear`; the sum is rounded once, the product is not."""
        self._product(x, hidden, alpha)
