"""Every Triton kernel as it is launched for common models: what `compile_report.py` compiles.

Types are Triton's: `*bf16` is a pointer to bfloat16. Every kernel in `kernels/gpu/` needs a case here (a test tells).
"""

from __future__ import annotations

from typing import Any

import triton

from ....kernels.gpu.activation import gated_activation_kernel
from ....kernels.gpu.attention import merge_kernel, paged_attention_kernel
from ....kernels.gpu.expert_sort import count_experts_kernel, sort_by_expert_kernel
from ....kernels.gpu.linear import few_rows_linear_kernel
from ....kernels.gpu.moe import grouped_linear_kernel, sum_experts_kernel
from ....kernels.gpu.norm import add_rms_norm_kernel, rms_norm_kernel
from ....kernels.gpu.paged_attention import KINDS, AttentionShape, choose_tiles, warps_for
from ....kernels.gpu.rotary import rotate_and_store_kernel, rotation_kernel
from ....kernels.gpu.routing import route_kernel
from ....kernels.gpu.step import prepare_kernel, record_kernel, update_kernel
from .compile_case import CompileCase
from .quantised_compile_cases import QUANTISED_CASES
from .sampling_compile_cases import SAMPLING_CASES

_FLOATS = ("partial_ptr", "partial_max_ptr", "partial_weight_ptr")


def _attention(
    label: str, kind: str, *, head_dim: int = 128, group: int = 4, element: str = "bf16", cache: str | None = None,
    block_size: int = 16, softcap: bool = False, window: bool = False, capabilities: tuple[int, ...] = (80, 90),
) -> CompileCase:  # fmt: skip
    """The attention kernel with the tiles that a GPU of that kind gives it."""
    itemsize = 4 if element == "fp32" else 2
    shared_memory = 163 * 1024 if 80 in capabilities else 227 * 1024
    tiles = choose_tiles(AttentionShape(group, 1, head_dim), itemsize, kind, shared_memory)
    dims = triton.next_power_of_2(head_dim)
    return CompileCase(
        paged_attention_kernel,
        f"{kind}, {label}",
        {"q_ptr": f"*{element}", "out_ptr": f"*{element}"}
        | dict.fromkeys(("k_ptr", "v_ptr"), f"*{cache or element}")
        | dict.fromkeys(("k_scales_ptr", "v_scales_ptr", *_FLOATS), "*fp32")
        | {"items_ptr": "*i32", "tables_ptr": "*i32"}
        | dict.fromkeys(("q_stride", "cache_stride"), "i32")
        | {"table_stride": "i32", "scale": "fp32", "softcap": "fp32", "window": "i32"},
        {
            "GROUP": group, "ROWS": tiles.rows, "KEYS": tiles.keys, "BLOCK_SIZE": block_size,
            "HEAD_DIM": head_dim, "DIMS": dims,
            "SOFTCAP": softcap, "WINDOW": window, "SCALED": cache is not None,
            "PRECISION": "ieee" if element == "fp32" else "tf32",
        },
        num_warps=warps_for(tiles, cache is not None),
        num_stages=tiles.stages,
        capabilities=capabilities,
        hot=element != "fp32",
        unaligned=("table_stride", "window"),
    )  # fmt: skip


def _linear(
    label: str, block_n: int, block_k: int, *, rows: int = 16, dtype: str = "bf16", warps: int = 4, stages: int = 4,
    out: str = "", **options: Any,
) -> CompileCase:  # fmt: skip
    return CompileCase(
        few_rows_linear_kernel,
        f"{dtype}, {rows} rows, {label}",
        dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), f"*{dtype}")
        | {"out_ptr": f"*{out or dtype}", "partial_ptr": "*fp32", "arrived_ptr": "*i32", "alpha": "fp32"}
        | dict.fromkeys({"rows", "outputs", "inputs", "x_stride", "out_stride"} - options.keys(), "i32"),
        {"HAS_BIAS": False, "ADD": False, "GATED": False, "ACTIVATION": 0, "SPLIT": False, "EVEN": True}
        | {"BLOCK_M": rows, "BLOCK_N": block_n, "BLOCK_K": block_k}
        | options,
        num_warps=warps,
        num_stages=stages,
    )


def _grouped(
    rows: int, block_n: int, block_k: int, *, gated: bool, dtype: str = "bf16", warps: int = 4, stages: int = 4
) -> CompileCase:
    return CompileCase(
        grouped_linear_kernel,
        f"{dtype}, blocks of {rows}, {'gate and up' if gated else 'down'}",
        dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), f"*{dtype}")
        | {"scale_ptr": f"*{dtype}" if gated else "*fp32", "sorted_ptr": "*i32", "block_experts_ptr": "*i32"}
        | dict.fromkeys(("assignments", "outputs", "inputs", "x_stride"), "i32"),
        {"ASSIGNMENTS_PER_ROW": 8 if gated else 1, "SCALED": not gated, "GATED": gated, "ACTIVATION": 0, "EVEN": True}
        | {"GROUP": 1 if rows < 64 else 8, "BLOCK_M": rows, "BLOCK_N": block_n, "BLOCK_K": block_k},
        num_warps=warps,
        num_stages=stages,
        unaligned=("assignments",),
    )


CASES = [
    *(
        _attention(f"{label}", kind, capabilities=(capability,), **options)
        for kind in KINDS
        for capability in (80, 90)
        for label, options in (
            ("bf16, head 128", {}),
            ("bf16, head 128, blocks of 64", {"block_size": 64}),
            ("bf16, head 64", {"head_dim": 64}),
            ("fp16, head 80", {"head_dim": 80, "element": "fp16"}),
            ("bf16, head 256, window, soft cap", {"head_dim": 256, "group": 2, "softcap": True, "window": True}),
            ("bf16, head 128, int8 cache", {"cache": "i8"}),
            ("fp32, head 128", {"element": "fp32"}),
        )
    ),
    *(_attention("bf16, head 128, fp8 cache", kind, cache="fp8e4nv", capabilities=(90,)) for kind in KINDS),
    CompileCase(
        merge_kernel,
        "bf16, head 128",
        {"out_ptr": "*bf16", "merges_ptr": "*i32"} | dict.fromkeys(_FLOATS, "*fp32"),
        {"GROUP": 4, "ROWS": 16, "HEAD_DIM": 128, "DIMS": 128, "PARTS": 16},
        num_warps=4,
    ),
    CompileCase(
        rms_norm_kernel,
        "bf16, width 4096",
        {"x_ptr": "*bf16", "rows_ptr": "*i64", "weight_ptr": "*fp32", "out_ptr": "*bf16"}
        | dict.fromkeys(("x_stride", "out_stride", "width"), "i32")
        | {"eps": "fp32"},
        {"HAS_ROWS": False, "BLOCK": 4096},
        num_warps=8,
    ),
    CompileCase(
        add_rms_norm_kernel,
        "bf16, width 4096",
        {"hidden_ptr": "*bf16", "x_ptr": "*bf16", "weight_ptr": "*fp32", "out_ptr": "*bf16"}
        | dict.fromkeys(("hidden_stride", "x_stride", "out_stride", "width"), "i32")
        | {"alpha": "fp32", "eps": "fp32"},
        {"BLOCK": 4096},
        num_warps=8,
    ),
    CompileCase(
        gated_activation_kernel,
        "bf16, SiLU",
        {"x_ptr": "*bf16", "out_ptr": "*bf16", "x_stride": "i32", "width": "i32"},
        {"ACTIVATION": 0, "BLOCK": 1024},
    ),
    CompileCase(
        rotation_kernel,
        "head 128",
        {"positions_ptr": "*i64", "frequencies_ptr": "*fp32", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
        | {"frequency_stride": "i32", "width": "i32", "factor": "fp32"},
        {"BLOCK": 64},
        num_warps=1,
        hot=False,
    ),
    *(
        CompileCase(
            rotate_and_store_kernel,
            f"bf16, head 128{', norms' if norm else ''}{', ' + cache + ' cache' if cache != 'bf16' else ''}",
            {"qkv_ptr": "*bf16", "query_ptr": "*bf16", "slots_ptr": "*i64", "k_ptr": f"*{cache}", "v_ptr": f"*{cache}"}
            | dict.fromkeys(
                ("cos_ptr", "sin_ptr", "query_norm_ptr", "key_norm_ptr", "k_scales_ptr", "v_scales_ptr"), "*fp32"
            )
            | dict.fromkeys(("pairs", "num_heads", "num_kv_heads", "cache_stride"), "i32")
            | {"eps": "fp32"},
            {
                "HEAD_DIM": 128,
                "DIMS": 128,
                "HALF": 64,
                "NORM": norm,
                "SCALED": cache != "bf16",
                "INTEGER": cache == "i8",
                "LARGEST": 3.3895313892515355e38,
                "PAIRS": 16,
            },
            capabilities=capabilities,
        )
        for norm, cache, capabilities in (
            (False, "bf16", (80, 90)),
            (True, "bf16", (80, 90)),
            (False, "i8", (80, 90)),
            (False, "fp8e4nv", (90,)),
        )
    ),
    _linear("stored", 64, 128),
    _linear("stored", 64, 128, rows=64),
    _linear("stored, split", 64, 128, SPLIT=True),
    _linear("added, split", 16, 256, SPLIT=True, ADD=True),
    _linear("bias", 64, 128, HAS_BIAS=True),
    _linear("float32 out", 64, 128, out="fp32"),
    _linear("one output", 16, 256, outputs=1, out_stride=1),
    _linear("gated", 32, 128, GATED=True),
    _linear("gated, split", 16, 256, GATED=True, SPLIT=True),
    _linear("stored, split", 32, 64, dtype="fp32", stages=3, SPLIT=True),
    _linear("gated", 16, 64, dtype="fp32", stages=3, GATED=True),
    _grouped(16, 32, 128, gated=True),
    _grouped(16, 64, 128, gated=False),
    _grouped(32, 32, 128, gated=True),
    _grouped(64, 64, 64, gated=True),
    _grouped(64, 128, 64, gated=False),
    _grouped(128, 64, 64, gated=True, warps=8),
    _grouped(128, 128, 64, gated=False, warps=8),
    _grouped(16, 32, 32, gated=True, dtype="fp32", stages=3),
    _grouped(64, 32, 32, gated=False, dtype="fp32", stages=3),
    CompileCase(
        sum_experts_kernel,
        "bf16, 8 per token",
        {"x_ptr": "*bf16", "out_ptr": "*bf16", "width": "i32"},
        {"EXPERTS_PER_TOKEN": 8, "BLOCK": 1024},
    ),
    *(
        CompileCase(
            route_kernel,
            f"bf16, {chosen} of {experts}",
            {"logits_ptr": "*bf16", "weights_ptr": "*fp32", "ids_ptr": "*i32"}
            | {"logits_stride": "i32", "num_experts": "i32"},
            {"NORMALIZE": True, "EXPERTS_PER_TOKEN": chosen, "SLOTS": chosen, "BLOCK": experts},
            num_warps=1,
        )
        for chosen, experts in ((1, 16), (8, 128), (8, 256))
    ),
    CompileCase(
        count_experts_kernel,
        "many",
        {"ids_ptr": "*i32", "counts_ptr": "*i32", "assignments": "i32"},
        {"BLOCK": 4096},
        num_warps=8,
        unaligned=("assignments",),
    ),
    *(
        CompileCase(
            sort_by_expert_kernel,
            f"128 experts, {'many' if many else 'few'}",
            dict.fromkeys(("ids_ptr", "counts_ptr", "sorted_ptr", "block_experts_ptr"), "*i32")
            | dict.fromkeys(("assignments", "num_experts", "max_blocks"), "i32"),
            {"HAS_COUNTS": many, "BLOCK_M": 64 if many else 16, "BLOCK_E": 128, "BLOCK": 4096 if many else 256},
            num_warps=8 if many else 4,
            unaligned=("assignments", "max_blocks"),
        )
        for many in (True, False)
    ),
    *QUANTISED_CASES,
    *SAMPLING_CASES,
    CompileCase(
        update_kernel,
        "int32",
        {"table_ptr": "*i32", "values_ptr": "*i32", "segments_ptr": "*i32", "table_stride": "i32"},
        {"BLOCK": 256},
        unaligned=("table_stride",),
    ),
    *(
        CompileCase(
            prepare_kernel,
            f"blocks of 16, {label}",
            {"rows_ptr": "*i32", "tokens_ptr": "*i32", "tables_ptr": "*i32"}
            | dict.fromkeys(("token_out_ptr", "position_out_ptr", "slot_out_ptr"), "*i64")
            | {"tokens_stride": "i32", "tables_stride": "i32"},
            {"BLOCK_SIZE": 16, "BLOCK": block},
            num_warps=1,
            unaligned=("tokens_stride", "tables_stride"),
        )
        for label, block in (("decode rows", 1), ("prompts", 256))
    ),
    CompileCase(
        record_kernel,
        "int64 tokens",
        {"tokens_ptr": "*i32", "places_ptr": "*i32", "sampled_ptr": "*i64", "count": "i32", "tokens_stride": "i32"},
        {"BLOCK": 256},
        num_warps=1,
        unaligned=("count", "tokens_stride"),
    ),
]
