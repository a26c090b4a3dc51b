"""The compiled products as operations, which the kernels run at once or record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .native_library import Epilogue, Kind, LinearOperation, QuantisedLinearOperation
from .packed_weight import PackedWeight
from .quantised_stream import QuantisedStream

if TYPE_CHECKING:
    from .native_kernels import NativeKernels


def run_product(
    kernels: NativeKernels,
    x: Tensor,
    weight: PackedWeight | QuantisedStream,
    bias: Tensor | None,
    out: Tensor,
    epilogue: Epilogue,
    *,
    activation: int = 0,
    alpha: float = 1.0,
) -> None:
    """A product of x [T, in]. For a quantised weight x is rounded to int8, with a scale per row and group of inputs."""
    if isinstance(weight, QuantisedStream):
        _run_quantised(kernels, x, weight, bias, out, epilogue, activation=activation, alpha=alpha)
    else:
        _run_packed(kernels, x, weight, bias, out, epilogue, activation=activation, alpha=alpha)


def is_bfloat16(dtype: torch.dtype) -> bool:
    """Whether a kernel takes a tensor for bfloat16; else it takes it for float32."""
    assert dtype in (torch.bfloat16, torch.float32)
    return dtype == torch.bfloat16


def row_stride(x: Tensor) -> int:
    """Elements between the rows of a matrix whose rows are contiguous."""
    assert x.dim() == 2
    assert x.stride(1) == 1
    return x.stride(0)


def _run_packed(
    kernels: NativeKernels,
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    out: Tensor,
    epilogue: Epilogue,
    *,
    activation: int,
    alpha: float,
) -> None:
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


def _run_quantised(
    kernels: NativeKernels,
    x: Tensor,
    weight: QuantisedStream,
    bias: Tensor | None,
    out: Tensor,
    epilogue: Epilogue,
    *,
    activation: int,
    alpha: float,
) -> None:
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
