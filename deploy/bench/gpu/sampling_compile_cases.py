"""The sampler's kernels as they are launched for Llama 3's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....kernels.gpu.argmax import merge_argmax_kernel, split_argmax_kernel, split_size, warps
from ....kernels.gpu.draw import draw_kernel, float_bits
from ....kernels.gpu.logits import count_tokens_kernel, edit_logits_kernel, penalise_kernel
from ....kernels.gpu.logprobs import (
    MAX_SELECTED,
    all_logprob_keys_kernel,
    chosen_logprobs_kernel,
    merge_top_logprobs_kernel,
    split_log_sum_kernel,
    split_top_logprobs_kernel,
)
from ....kernels.gpu.weights import CANDIDATES, list_candidates_kernel, sum_weights_kernel, weight_bits
from .compile_case import CompileCase

VOCAB = 128_256
BLOCK = split_size(VOCAB)
WARPS = warps(BLOCK)
SPLITS = -(-VOCAB // BLOCK)
SCALE = 2.0 ** weight_bits(VOCAB)
_CUT: dict[str, Any] = {"BLOCK": BLOCK, "BLOCK_S": SPLITS}
_LOG_SUMS = {"maxima_ptr": "*fp32", "sums_ptr": "*fp32"}
_ROW = {"temperature_ptr": "*fp32", "filtered_ptr": "*i32"}


def _case(kernel: Any, label: str, types: Mapping[str, str], constants: Mapping[str, Any], warps: int) -> CompileCase:
    unaligned = ("tokens_stride", "entries", "alternatives", "first")
    return CompileCase(kernel, label, types, constants, num_warps=warps, unaligned=unaligned)


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


_REPORTED = {"logits_ptr": "*fp32", "rows_ptr": "*i32"} | _LOG_SUMS

SAMPLING_CASES = [
    *(
        _case(
            split_argmax_kernel,
            "128k, some drawn" if drawn else "128k, all greedy",
            {"logits_ptr": "*fp32", "temperature_ptr": "*fp32" if drawn else "*i64", "best_ptr": "*i64"}
            | _integers("stride", "vocab"),
            {"HAS_TEMPERATURE": drawn, "BLOCK": BLOCK},
            WARPS,
        )
        for drawn in (False, True)
    ),
    _case(
        merge_argmax_kernel,
        "128k",
        {"best_ptr": "*i64", "tokens_ptr": "*i64"} | _integers("splits"),
        {"BLOCK_S": SPLITS},
        1,
    ),
    _case(
        sum_weights_kernel,
        "128k",
        {"logits_ptr": "*fp32", "best_ptr": "*i64"}
        | _ROW
        | {"min_weight_ptr": "*i64", "sums_ptr": "*i64", "octaves_ptr": "*i32"}
        | _integers("stride", "vocab"),
        {"SCALE": SCALE} | _CUT,
        WARPS,
    ),
    _case(
        list_candidates_kernel,
        "128k",
        {"logits_ptr": "*fp32", "best_ptr": "*i64"}
        | _ROW
        | dict.fromkeys(("octaves_ptr", "headers_ptr", "ids_ptr", "bits_ptr"), "*i32")
        | _integers("stride", "vocab"),
        {"CAPACITY": CANDIDATES, "SCALE": SCALE} | _CUT,
        WARPS,
    ),
    _case(
        draw_kernel,
        "128k",
        {"logits_ptr": "*fp32", "best_ptr": "*i64", "top_k_ptr": "*i32", "top_p_ptr": "*fp64"}
        | _ROW
        | dict.fromkeys(("min_weight_ptr", "seed_ptr", "position_ptr", "sums_ptr", "tokens_ptr"), "*i64")
        | dict.fromkeys(("headers_ptr", "ids_ptr", "bits_ptr"), "*i32")
        | _integers("stride", "vocab", "splits"),
        {"CAPACITY": CANDIDATES, "SCALE": SCALE, "LARGEST": float_bits(SCALE)} | _CUT,
        8,
    ),
    _case(
        edit_logits_kernel,
        "any",
        {"rows_ptr": "*i32", "tokens_ptr": "*i32", "values_ptr": "*fp32", "logits_ptr": "*fp32"}
        | _integers("stride", "entries"),
        {"BLOCK": 1024},
        4,
    ),
    _case(
        count_tokens_kernel,
        "128k",
        {"places_ptr": "*i64", "tokens_ptr": "*i32", "counts_ptr": "*i32"} | _integers("tokens_stride", "vocab"),
        {"BLOCK": 1024},
        4,
    ),
    _case(
        penalise_kernel,
        "128k",
        {"places_ptr": "*i64", "coefficients_ptr": "*fp32", "tokens_ptr": "*i32", "counts_ptr": "*i32"}
        | {"logits_ptr": "*fp32"}
        | _integers("tokens_stride", "logits_stride", "vocab"),
        {"BLOCK": 1024},
        4,
    ),
    _case(split_log_sum_kernel, "128k", _REPORTED | _integers("stride", "vocab"), {"BLOCK": BLOCK}, WARPS),
    _case(
        split_top_logprobs_kernel,
        "128k",
        _REPORTED | {"keys_ptr": "*i64"} | _integers("stride", "vocab", "alternatives"),
        {"SELECTED": MAX_SELECTED} | _CUT,
        WARPS,
    ),
    _case(
        merge_top_logprobs_kernel,
        "128k",
        {"keys_ptr": "*i64", "ids_ptr": "*i32", "values_ptr": "*fp32"} | _integers("splits", "alternatives"),
        {"SELECTED": MAX_SELECTED, "BLOCK": SPLITS * MAX_SELECTED},
        4,
    ),
    _case(
        all_logprob_keys_kernel,
        "128k",
        _REPORTED | {"keys_ptr": "*i64"} | _integers("first", "stride", "vocab"),
        _CUT,
        WARPS,
    ),
    _case(
        chosen_logprobs_kernel,
        "128k",
        _REPORTED
        | {"reported_ptr": "*i32", "tokens_ptr": "*i64", "chosen_ptr": "*fp32"}
        | _integers("stride", "splits"),
        {"BLOCK_S": SPLITS},
        1,
    ),
]
