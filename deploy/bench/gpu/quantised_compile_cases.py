"""The kernels of quantised weights as they are launched for common models; see `compile_cases.py`."""

from __future__ import annotations

from typing import Any

from ....kernels.gpu.eight_bit_linear import eight_bit_linear_kernel
from ....kernels.gpu.quantised_activations import round_activations_kernel
from ....kernels.gpu.quantised_layout import dequantise_kernel
from ....kernels.gpu.quantised_linear import few_rows_quantised_kernel
from ....kernels.gpu.quantised_moe import grouped_quantised_kernel
from ....kernels.gpu.quantised_tile import BLOCK_INPUTS
from .compile_case import CompileCase

_WEIGHT_TYPES = {"values_ptr": "*u8", "scales_ptr": "*bf16", "zeros_ptr": "*u8"}
_UNALIGNED = ("rows", "assignments", "groups", "alpha")


def _weight(bits: int, group: int, *, floats: bool, zeros: bool) -> dict[str, Any]:
    part = BLOCK_INPUTS * bits // 8
    return {"BITS": bits, "FLOAT": floats, "ZEROS": zeros, "GROUP": group, "PART": min(part, group or part)}


def _few_rows(
    label: str, rows: int, block_n: int, *, bits: int = 4, group: int = 128, floats: bool = False, zeros: bool = False,
    dtype: str = "bf16", out: str = "", warps: int = 4, stages: int = 4, **options: Any,
) -> CompileCase:  # fmt: skip
    return CompileCase(
        few_rows_quantised_kernel,
        f"{'float8' if floats else f'int{bits}'}, groups of {group or 'a row'}, {dtype}, {rows} rows, {label}",
        _WEIGHT_TYPES
        | dict.fromkeys(("x_ptr", "bias_ptr"), f"*{dtype}")
        | {"out_ptr": f"*{out or dtype}", "partial_ptr": "*fp32", "arrived_ptr": "*i32", "alpha": "fp32"}
        | dict.fromkeys(("rows", "outputs", "inputs", "row_bytes", "groups", "x_stride", "out_stride"), "i32"),
        {"HAS_BIAS": False, "ADD": False, "GATED": False, "ACTIVATION": 0, "SPLIT": True, "EVEN": True}
        | {"BLOCK_INPUTS": BLOCK_INPUTS, "BLOCK_M": rows, "BLOCK_N": block_n}
        | _weight(bits, group, floats=floats, zeros=zeros)
        | options,
        num_warps=warps,
        num_stages=stages,
        hot=dtype != "fp32",
        unaligned=_UNALIGNED,
    )


def _grouped(
    rows: int, block_n: int, *, gated: bool, bits: int = 4, dtype: str = "bf16", warps: int = 4, stages: int = 4
) -> CompileCase:
    return CompileCase(
        grouped_quantised_kernel,
        f"int{bits}, {dtype}, blocks of {rows}, {'gate and up' if gated else 'down'}",
        _WEIGHT_TYPES
        | dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}")
        | {"scale_ptr": "*fp32", "sorted_ptr": "*i32", "block_experts_ptr": "*i32"}
        | dict.fromkeys(("assignments", "outputs", "inputs", "row_bytes", "groups", "x_stride"), "i32"),
        {"ASSIGNMENTS_PER_ROW": 8 if gated else 1, "SCALED": not gated, "GATED": gated, "ACTIVATION": 0, "EVEN": True}
        | {"TOGETHER": 1 if rows < 64 else 8, "BLOCK_INPUTS": BLOCK_INPUTS, "BLOCK_M": rows, "BLOCK_N": block_n}
        | _weight(bits, 128, floats=False, zeros=False),
        num_warps=warps,
        num_stages=stages,
        unaligned=_UNALIGNED,
    )


def _eight_bit(
    label: str, values: str, rows: int, block_n: int, *, group: int = 0, warps: int = 4, stages: int = 4, **options: Any
) -> CompileCase:
    return CompileCase(
        eight_bit_linear_kernel,
        f"{values}, tiles of {rows} rows, groups of {group or 'a row'}, {label}",
        dict.fromkeys(("x_ptr", "weight_ptr"), f"*{values}")
        | dict.fromkeys(("x_scales_ptr", "partial_ptr"), "*fp32")
        | dict.fromkeys(("scales_ptr", "bias_ptr", "out_ptr"), "*bf16")
        | {"arrived_ptr": "*i32", "alpha": "fp32"}
        | dict.fromkeys(("rows", "outputs", "inputs", "groups", "out_stride"), "i32"),
        {"HAS_BIAS": False, "ADD": False, "GATED": False, "ACTIVATION": 0, "SPLIT": False, "EVEN": True}
        | {"GROUP": group, "TOGETHER": 8, "BLOCK_M": rows, "BLOCK_N": block_n, "BLOCK_K": BLOCK_INPUTS}
        | options,
        num_warps=warps,
        num_stages=stages,
        capabilities=(80, 90) if values == "i8" else (90,),
        unaligned=_UNALIGNED,
    )


QUANTISED_CASES = [
    _few_rows("stored", 16, 128, SPLIT=False),
    _few_rows("stored, split", 16, 64),
    _few_rows("stored, split", 32, 128),
    _few_rows("zeros, added, split", 16, 128, zeros=True, ADD=True),
    _few_rows("stored, split", 16, 128, group=0),
    _few_rows("stored, split", 16, 128, group=32),
    _few_rows("gated, split", 16, 64, GATED=True),
    _few_rows("gated", 32, 64, GATED=True, SPLIT=False),
    _few_rows("float32 out, bias, split", 16, 128, dtype="fp16", out="fp32", HAS_BIAS=True),
    _few_rows("stored, split", 16, 128, bits=8),
    _few_rows("gated, split", 32, 64, bits=8, group=0, GATED=True),
    _few_rows("stored, split", 16, 128, bits=8, floats=True),
    _few_rows("stored, split", 16, 16, dtype="fp32", stages=2),
    _grouped(16, 64, gated=True),
    _grouped(16, 128, gated=False),
    _grouped(64, 32, gated=True, stages=3),
    _grouped(128, 64, gated=False, warps=8, stages=3),
    _eight_bit("stored, split", "i8", 16, 64, SPLIT=True),
    _eight_bit("gated", "i8", 64, 64, GATED=True),
    _eight_bit("stored", "i8", 128, 128, warps=8, stages=3),
    _eight_bit("stored, split", "fp8e4nv", 16, 64, SPLIT=True),
    _eight_bit("stored", "fp8e4nv", 128, 128, warps=8, stages=3),
    _eight_bit("stored", "fp8e4nv", 128, 128, group=128, warps=8, stages=3),
    _eight_bit("gated", "fp8e4nv", 128, 64, group=128, GATED=True, warps=8, stages=3),
    *(
        CompileCase(
            round_activations_kernel,
            f"bf16 to {label}",
            {"x_ptr": "*bf16", "order_ptr": "*i64", "out_ptr": f"*{out}", "scales_ptr": "*fp32"}
            | dict.fromkeys(("x_stride", "inputs", "groups", "group_size"), "i32"),
            {"ORDERED": False, "INTEGER": integer, "EXPANDED": out == "bf16"}
            | {"BLOCK_GROUPS": max(1, 1024 // block), "BLOCK": block},
            num_warps=4 if block <= 4096 else 8,
            capabilities=capabilities,
            unaligned=_UNALIGNED,
        )
        for label, out, integer, block, capabilities in (
            ("int8, a row of 4096", "i8", True, 4096, (80, 90)),
            ("int8, a row of 14336", "i8", True, 16384, (80, 90)),
            ("float8, groups of 128", "fp8e4nv", False, 128, (90,)),
            ("float8 and back, groups of 128", "bf16", False, 128, (80, 90)),
        )
    ),
    *(
        CompileCase(
            dequantise_kernel,
            f"{'float8' if floats else f'int{bits}'} to bf16",
            _WEIGHT_TYPES | {"out_ptr": "*bf16"}
            | dict.fromkeys(("rows", "inputs", "row_bytes", "first_row", "stride"), "i32"),
            _weight(bits, 128, floats=floats, zeros=bits == 4) | {"BLOCK_ROWS": 32},
            num_warps=4,
            unaligned=_UNALIGNED,
        )
        for bits, floats in ((4, False), (8, True))
    ),
]  # fmt: skip
