"""The compiled products as operations, which the kernels run at once or record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    common: dict[str, Any] = {
        "bfloat16": is_bfloat16(x.dtype),
        "out_features": out.shape[1],
        "epilogue": epilogue,
        "activation": activation,
        "out_float32": out.dtype == torch.float32 and x.dtype != torch.float32,
        "alpha": alpha,
        "x": x.data_ptr(),
        "weight": weight.data.data_ptr(),
        "bias": None if bias is None else bias.data_ptr(),
        "out": out.data_ptr(),
        "x_stride": row_stride(x),
        "out_stride": row_stride(out),
    }
    if isinstance(weight, PackedWeight):
        assert x.dtype == weight.dtype
        assert x.shape[1] == weight.shape[1]
        plain = LinearOperation(kind=Kind.LINEAR, compressed=weight.compressed, in_features=x.shape[1], **common)
        kernels.run_rows(plain, len(x), x, weight.data, bias, out)
        return
    assert weight.order is not None or x.shape[1] == weight.shape[1]
    quantised = kernels.workspace(x, weight.padded_inputs + (4 + 4) * weight.groups)  # integers, scales and sums
    operation = QuantisedLinearOperation(
        kind=Kind.QUANTISED_LINEAR,
        in_features=weight.padded_inputs,
        bits=weight.bits,
        group_size=weight.group_size,
        scale_kind=weight.scale_kind,
        zeros=weight.has_zeros,
        row_scale=weight.row_scale,
        x_features=x.shape[1],
        order=None if weight.order is None else weight.order.data_ptr(),
        quantised=quantised.data_ptr(),
        **common,
    )
    kernels.run_rows(operation, len(x), x, weight.data, weight.order, bias, out, quantised)


def is_bfloat16(dtype: torch.dtype) -> bool:
    """Whether a kernel takes a tensor for bfloat16; else it takes it for float32."""
    assert dtype in (torch.bfloat16, torch.float32)
    return dtype == torch.bfloat16


def row_stride(x: Tensor) -> int:
    """Elements between the rows of a matrix whose rows are contiguous."""
    assert x.dim() == 2
    assert x.stride(1) == 1
    return x.stride(0)
