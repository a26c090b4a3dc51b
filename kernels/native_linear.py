"""Products behind the compiled kernels' interface: compiled ones, and torch's between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .interface import Linear
from .native_library import ACTIVATIONS, Epilogue
from .native_products import run_product
from .packed_weight import GROUP, PackedWeight, interleave_gate
from .quantised_stream import QuantisedStream

if TYPE_CHECKING:
    from .native_kernels import NativeKernels


class NativeLinear:
    """See `interface.Linear`."""

    def __init__(self, kernels: NativeKernels, weight: PackedWeight | QuantisedStream, bias: Tensor | None) -> None:
        self._kernels = kernels
        self.weight = weight
        self._bias = _padded(bias)

    def __call__(self, x: Tensor) -> Tensor:
        out = self._kernels.temporary(x, self.weight.shape[0], x.dtype)
        self._run(x, out, Epilogue.STORE)
        return out

    def float32(self, x: Tensor) -> Tensor:
        """See `interface.Linear`."""
        out = self._kernels.kept(x, self.weight.shape[0])
        self._run(x, out, Epilogue.STORE)
        return out

    def add_to(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """See `interface.Linear`."""
        assert hidden.shape == (len(x), self.weight.shape[0])
        self._run(x, hidden, Epilogue.ADD_TO, alpha)

    def _run(self, x: Tensor, out: Tensor, epilogue: Epilogue, alpha: float = 1.0) -> None:
        run_product(self._kernels, x, self.weight, self._bias, out, epilogue, alpha=alpha)


class NativeGatedLinear:
    """The two halves of a gated MLP's first product, and what joins them, in one pass."""

    def __init__(
        self,
        kernels: NativeKernels,
        weight: PackedWeight | QuantisedStream,
        bias: Tensor | None,
        activation: str,
        width: int,
    ) -> None:
        """
        Args:
            weight: of [2 * width, in], with rows padded and interleaved as `interleave_gate` does.
            bias: [2 * width], gate first.
        """
        self._kernels = kernels
        self._activation = ACTIVATIONS[activation]
        self._weight, self._width = weight, width
        self._bias = _padded(None if bias is None else interleave_gate(bias))

    def __call__(self, x: Tensor) -> Tensor:
        out = self._kernels.temporary(x, self._width, x.dtype, spread=True)
        run_product(self._kernels, x, self._weight, self._bias, out, Epilogue.GATED, activation=self._activation)
        return out


class LibraryLinear:
    """See `interface.Linear`: torch's product between compiled kernels."""

    def __init__(self, kernels: NativeKernels, product: Linear, out_features: int) -> None:
        self._kernels, self._product, self._out_features = kernels, product, out_features

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.on_host(self._product, x, width=self._out_features)

    def float32(self, x: Tensor) -> Tensor:
        """See `interface.Linear`; not recorded."""
        return self._product.float32(x)

    def add_to(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """See `interface.Linear`."""
        self._kernels.add_(hidden, self(x), alpha)


def _padded(bias: Tensor | None) -> Tensor | None:
    """float32, with zeros up to whole groups, as the kernel reads it."""
    if bias is None:
        return None
    return torch.nn.functional.pad(bias.float(), (0, -len(bias) % GROUP)).contiguous()
