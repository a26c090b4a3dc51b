"""Compiled products with quantised weights: they run at once, or are recorded while a program is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .native_library import ACTIVATIONS, Epilogue, Kind, QuantisedLinearOperation
from .native_linear import is_bfloat16, padded_bias, row_stride
from .packed_weight import interleave_gate
from .quantised_stream import QuantisedStream
from .quantised_weight import QuantisedWeight

if TYPE_CHECKING:
    from .native_kernels import NativeKernels


class NativeQuantisedLinear:
    """See `interface.Linear`. x is rounded to int8, with a scale per row and group of inputs."""

    def __init__(self, kernels: NativeKernels, weight: QuantisedWeight, bias: Tensor | None) -> None:
        self._kernels = kernels
        self.weight = kernels.stream(weight)
        self._bias = padded_bias(bias)

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
        run_quantised_linear(self._kernels, x, self.weight, self._bias, out, epilogue, alpha=alpha)


class NativeQuantisedGatedLinear:
    """The two halves of a gated MLP's first product, and what joins them, in one pass."""

    def __init__(self, kernels: NativeKernels, weight: QuantisedWeight, bias: Tensor | None, activation: str) -> None:
        self._kernels = kernels
        self._activation = ACTIVATIONS[activation]
        self._width = len(weight) // 2
        self._weight = kernels.stream(weight, gated=True)
        self._bias = None if bias is None else padded_bias(interleave_gate(bias))

    def __call__(self, x: Tensor) -> Tensor:
        out = self._kernels.temporary(x, self._width, x.dtype, spread=True)
        run_quantised_linear(
            self._kernels, x, self._weight, self._bias, out, Epilogue.GATED, activation=self._activation
        )
        return out


def run_quantised_linear(
    kernels: NativeKernels,
    x: Tensor,
    weight: QuantisedStream,
    bias: Tensor | None,
    out: Tensor,
    epilogue: Epilogue,
    *,
    activation: int = 0,
    alpha: float = 1.0,
) -> None:
    """Emit a product of x [T, in]."""
    assert weight.order is not None or x.shape[1] == weight.shape[1]
    quantised = kernels.workspace(x, weight.padded_inputs + (4 + 4) * weight.groups)  # integers, scales and sums
    operation = QuantisedLinearOperation(
        Kind.QUANTISED_LINEAR,
        is_bfloat16(x.dtype),
        False,
        weight.padded_inputs,
        out.shape[1],
        epilogue,
        activation,
        out.dtype == torch.float32 and x.dtype != torch.float32,
        alpha,
        x.data_ptr(),
        weight.data.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        row_stride(x),
        row_stride(out),
        weight.bits,
        weight.group_size,
        weight.scale_kind,
        weight.has_zeros,
        weight.row_scale,
        x.shape[1],
        None if weight.order is None else weight.order.data_ptr(),
        quantised.data_ptr(),
    )
    kernels.run_rows(operation, len(x), x, weight.data, weight.order, bias, out, quantised)
