"""Products behind the compiled kernels' interface: compiled ones, and torch's between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .interface import Linear
from .native_library import ACTIVATIONS, Epilogue, Kind, LinearOperation
from .packed_weight import GROUP, PackedWeight, interleave_gate

if TYPE_CHECKING:
    from .native_kernels import NativeKernels


class NativeLinear:
    """See `interface.Linear`."""

    def __init__(self, kernels: NativeKernels, weight: Tensor, bias: Tensor | None) -> None:
        self._kernels = kernels
        self.weight = kernels.pack(weight)
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
        run_linear(self._kernels, x, self.weight, self._bias, out, epilogue, alpha=alpha)


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


class NativeGatedLinear:
    """The two halves of a gated MLP's first product, and what joins them, in one pass."""

    def __init__(self, kernels: NativeKernels, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        self._kernels = kernels
        self._activation = ACTIVATIONS[activation]
        self._width = len(weight) // 2
        self._weight = kernels.pack(interleave_gate(weight), weight.nbytes)
        self._bias = None if bias is None else padded_bias(interleave_gate(bias))

    def __call__(self, x: Tensor) -> Tensor:
        out = self._kernels.temporary(x, self._width, x.dtype, spread=True)
        run_linear(
            self._kernels,
            x,
            self._weight,
            self._bias,
            out,
            Epilogue.GATED,
            activation=self._activation,
        )
        return out


def run_linear(
    kernels: NativeKernels,
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    out: Tensor,
    epilogue: Epilogue,
    *,
    activation: int = 0,
    alpha: float = 1.0,
) -> None:
    """Emit a product of x [T, in]."""
    assert x.dtype == weight.dtype
    assert x.shape[1] == weight.shape[1]
    operation = LinearOperation(
        Kind.LINEAR,
        is_bfloat16(x.dtype),
        weight.compressed,
        x.shape[1],
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
    )
    kernels.run_rows(operation, len(x), x, weight.data, bias, out)


def padded_bias(bias: Tensor | None) -> Tensor | None:
    """float32, with zeros up to whole groups, as the kernel reads it."""
    if bias is None:
        return None
    return torch.nn.functional.pad(bias.float(), (0, -len(bias) % GROUP)).contiguous()


def is_bfloat16(dtype: torch.dtype) -> bool:
    """Whether a kernel takes a tensor for bfloat16; else it takes it for float32."""
    assert dtype in (torch.bfloat16, torch.float32)
    return dtype == torch.bfloat16


def row_stride(x: Tensor) -> int:
    """Elements between the rows of a matrix whose rows are contiguous."""
    assert x.dim() == 2
    assert x.stride(1) == 1
    return x.stride(0)
