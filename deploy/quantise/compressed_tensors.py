"""Quantised weights in the compressed-tensors format: the tensors of a module, and what config.json says about them.

Format: https://github.com/vllm-project/compressed-tensors, `compressors/pack_quantized` and
`compressors/naive_quantized`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .options import CHANNEL, QuantiseOptions
from .rounding import RoundedWeight

FORMAT_VERSION = "0.20.0"
"""Of the library whose layout this is."""

PACKED_AT_ONCE = 2**22
"""Integers: on the way every bit takes a byte."""


def pack_bits(integers: Tensor, bits: int) -> Tensor:
    """[rows, n] uint8 below 2^bits → [rows, ceil(n * bits / 32)] int32: a row is one string of bits, lowest first.

    An integer of 3 bits may lie across two words; 32 of them take exactly 3.
    """
    rows, count = integers.shape
    words = -(-count * bits // 32)
    packed = torch.empty(rows, words, dtype=torch.int32)
    for start in range(0, rows, step := max(1, PACKED_AT_ONCE // max(count, 1))):
        part = integers[start : start + step]
        string = torch.zeros(len(part), words * 32, dtype=torch.uint8)
        planes = (part[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
        string[:, : count * bits] = planes.flatten(1)
        eights = string.unflatten(1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)
        packed[start : start + step] = eights.sum(-1, dtype=torch.uint8).view(torch.int32)
    return packed


def module_tensors(module: str, rounded: RoundedWeight, *, packed: bool) -> dict[str, Tensor]:
    """The tensors that stand for `{module}.weight`.

    Args:
        packed: "pack-quantized": integers in words of 32 bits; else "int-quantized": one signed byte each.
    """
    grid = rounded.grid
    tensors = {f"{module}.weight_scale": rounded.scales.to(grid.scale_dtype).contiguous()}
    if not packed:
        tensors[f"{module}.weight"] = (rounded.integers ^ 128).view(torch.int8)
        return tensors
    tensors[f"{module}.weight_packed"] = pack_bits(rounded.integers, grid.bits)
    tensors[f"{module}.weight_shape"] = torch.tensor(rounded.integers.shape)
    if not grid.symmetric:
        zeros = pack_bits(rounded.zeros.to(torch.uint8).T.contiguous(), grid.bits)
        tensors[f"{module}.weight_zero_point"] = zeros.T.contiguous()
    return tensors


def quantization_config(options: QuantiseOptions, ignore: Sequence[str], head: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        ignore: names or patterns of the modules with a matrix that stays as it is.
        head: the output projection's module, by its names.
    """
    groups = {"group_0": _group(["Linear"], options.bits, options.group_size, options)}
    if options.head_bits is not None:
        groups["group_1"] = _group(list(head), options.head_bits, options.group_size, options)
    return {
        "quant_method": "compressed-tensors",
        "format": _format(options),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": FORMAT_VERSION,
    }


def _format(options: QuantiseOptions) -> str:
    return "pack-quantized" if options.activation_bits is None else "int-quantized"


def _group(targets: list[str], bits: int, group_size: int, options: QuantiseOptions) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": options.symmetric,
        "strategy": "channel" if group_size == CHANNEL else "group",
        "group_size": None if group_size == CHANNEL else group_size,
        "dynamic": False,
    }
    activations = None
    if options.activation_bits is not None:
        activations = {
            "num_bits": options.activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": _format(options),
    }
