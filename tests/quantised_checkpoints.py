"""Tiny models quantised in every format that is read, each with the dense model of exactly the same numbers.

compressed-tensors packs its own; GPTQ, AWQ and fp8 are packed here, bit by bit from their documented layouts.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model
from torch import Tensor

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
"""Of which groups of 32 divide the first, and the second but not its half."""

Packed = tuple[dict[str, Tensor], Tensor]
"""Tensors by their names below the module's, and the matrix that they stand for."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to quantise a checkpoint."""

    config: dict[str, Any]
    """`quantization_config`."""
    pack: Callable[[Tensor], Packed]


def is_linear(module: str) -> bool:
    """The layers that checkpoints quantise unless told otherwise."""
    return module.endswith("_proj") or ".experts." in module


def quantise(
    family: str, folder: Path, form: Format, chosen: Callable[[str], bool] = is_linear, **overrides: Any
) -> tuple[Path, Path]:
    """Write a tiny model twice: quantised where `chosen` says so of a module, and dense with the same numbers.

    Returns:
        Both folders.
    """
    dense = make_tiny_model(family, folder / "dense", **{**SIZES, **overrides})
    tensors = load_file(dense / "model.safetensors")
    packed = dict(tensors)
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and tensor.ndim == 2 and chosen(module):
            parts, tensors[name] = form.pack(tensor)
            del packed[name]
            packed |= {f"{module}.{part}": content.contiguous() for part, content in parts.items()}
    save_file(tensors, dense / "model.safetensors")
    quantised = shutil.copytree(dense, folder / "quantised")
    save_file(packed, quantised / "model.safetensors")
    change_config(quantised, quantization_config=form.config)
    return quantised, dense


def change_config(folder: Path, **fields: Any) -> None:
    """Set fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def pack_bits(integers: Tensor, bits: int) -> Tensor:
    """[rows, n] → int32 [rows, words]: the bits of all integers one after the other, the lowest first."""
    ones = (integers.numpy()[..., None] >> np.arange(bits)) & 1
    stream = ones.reshape(len(integers), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    octets = np.packbits(stream.astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(octets.view("<i4").copy())


def rounded(weight: Tensor, group_of: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers [out, in], scales and zero points [out, groups], and the weight that they stand for."""
    count, top = int(group_of.max()) + 1, (1 << bits) - 1
    scales = torch.empty(len(weight), count, dtype=torch.float16)
    zeros = torch.full((len(weight), count), 1 << (bits - 1))
    for group in range(count):
        columns = weight[:, group_of == group]
        low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
        if symmetric:
            scales[:, group] = torch.maximum(-low, high) * 2 / top
        else:
            scales[:, group] = (high - low) / top
            zeros[:, group] = (-low / scales[:, group]).round().clamp(0, top)
    wide, offset = scales.float()[:, group_of], zeros[:, group_of]
    integers = ((weight / wide).round() + offset).clamp(0, top).int()
    return integers, scales, zeros, (integers - offset) * wide


def gptq(bits: int, group_size: int, *, symmetric: bool = True, act_order: bool = False, version: int = 1) -> Format:
    """The layout of AutoGPTQ and GPTQModel."""

    def pack(weight: Tensor) -> Packed:
        inputs = weight.shape[1]
        group_of = torch.arange(inputs) // (inputs if group_size == -1 else group_size)
        if act_order:  # the same for all matrices of one input
            group_of = group_of[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        integers, scales, zeros, dense = rounded(weight, group_of, bits, symmetric)
        if not symmetric:
            zeros[0, 0] = 0
            dense[0] = (integers[0] - zeros[0, group_of]) * scales.float()[0, group_of]
        stored = pack_bits(zeros.T, bits)
        if version == 1 and bits == 3:
            stored = pack_bits((zeros.T - 1) % 8, bits)
        elif version == 1:
            stored = stored - {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
        parts = {"qweight": pack_bits(integers, bits).T, "qzeros": stored, "scales": scales.T}
        return {**parts, "g_idx": group_of.int()}, dense

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": act_order,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Format(config, pack)


def awq(group_size: int) -> Format:
    """The GEMM layout of AutoAWQ."""

    def interleaved(integers: Tensor) -> Tensor:
        columns = integers.unflatten(1, (-1, 8)).numpy().astype(np.uint32)
        words = np.zeros(columns.shape[:2], dtype=np.uint32)
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words |= columns[..., column] << np.uint32(4 * nibble)
        return torch.from_numpy(words.view(np.int32))

    def pack(weight: Tensor) -> Packed:
        inputs = weight.shape[1]
        group_of = torch.arange(inputs) // (inputs if group_size == -1 else group_size)
        integers, scales, zeros, dense = rounded(weight, group_of, 4, symmetric=False)
        return {"qweight": interleaved(integers.T), "qzeros": interleaved(zeros.T), "scales": scales.T}, dense

    return Format({"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}, pack)


def fp8(block: tuple[int, int] | None) -> Format:
    """The layout of transformers' FP8Linear."""

    def pack(weight: Tensor) -> Packed:
        out, inputs = weight.shape
        height, width = block or weight.shape
        scales = torch.empty(-(-out // height), -(-inputs // width))
        for row in range(len(scales)):
            for column in range(scales.shape[1]):
                part = weight[row * height : (row + 1) * height, column * width : (column + 1) * width]
                scales[row, column] = part.abs().max() / 448
        wide = scales.repeat_interleave(height, 0)[:out].repeat_interleave(width, 1)[:, :inputs]
        values = (weight / wide).to(torch.float8_e4m3fn)
        stored = scales if block is not None else scales.reshape(())
        return {"weight": values, "weight_scale_inv": stored}, values.float() * wide

    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    return Format({**config, "weight_block_size": block}, pack)


def compressed(form: str, *, activations: bool = False, **arguments: Any) -> Format:
    """A checkpoint of compressed-tensors, packed by that library.

    Args:
        form: its name of the format.
        arguments: of `QuantizationArgs` for the weights.
    """
    args = QuantizationArgs(**arguments)
    inputs = QuantizationArgs(num_bits=8, type=args.type, strategy="token", dynamic=True) if activations else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs, format=form)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, ignore=["lm_head"], quantization_status="compressed"
    )
    library = BaseCompressor.get_value_from_registry(form)

    def pack(weight: Tensor) -> Packed:
        scales, zeros = _library_scales(weight, args)
        state = {"weight": weight, "weight_scale": scales}
        if not args.symmetric:
            state["weight_zero_point"] = zeros
        packed = library.compress(state, scheme)
        return packed, library.decompress(packed, scheme)["weight"]

    return Format(json.loads(config.model_dump_json()), pack)


def _library_scales(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Scales and zero points of the shapes that the library wants."""
    out, inputs = weight.shape
    height, width = 1, args.group_size or inputs
    if args.strategy == "tensor":
        height, width = out, inputs
    elif args.strategy == "channel":
        width = inputs
    elif args.strategy == "block":
        assert args.block_structure is not None
        height, width = args.block_structure
    padded = torch.nn.functional.pad(weight, (0, -inputs % width, 0, -out % height))
    blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    top = 448.0 if args.type == "float" else float((1 << (args.num_bits - 1)) - 1)
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    if args.symmetric:
        scales, zeros = torch.maximum(-low, high) / top, torch.zeros_like(low)
    else:
        scales = (high.clamp(min=0) - low.clamp(max=0)) / (2 * top + 1)
        zeros = (-top - 1 - low.clamp(max=0) / scales).round().clamp(-top - 1, top)
    if args.strategy == "tensor":
        scales, zeros = scales.reshape(1), zeros.reshape(1)
    return scales.contiguous(), zeros.to(torch.int8).contiguous()


FORMATS: dict[str, Format] = {
    "gptq int4 g32": gptq(4, 32),
    "gptq int4 g32 with zeros": gptq(4, 32, symmetric=False),
    "gptq int4 act order": gptq(4, 32, symmetric=False, act_order=True),
    "gptq int4 per row": gptq(4, -1),
    "gptq int8 v2": gptq(8, 32, version=2),
    "gptq int8 with zeros": gptq(8, 32, symmetric=False),
    "gptq int3 act order": gptq(3, 32, act_order=True),
    "gptq int3 with zeros": gptq(3, 32, symmetric=False),
    "gptq int2": gptq(2, 32, symmetric=False),
    "awq g32": awq(32),
    "awq per row": awq(-1),
    "packed int4 g32": compressed("pack-quantized", num_bits=4, group_size=32, strategy="group"),
    "packed int4 with zeros": compressed(
        "pack-quantized", num_bits=4, group_size=32, strategy="group", symmetric=False
    ),
    "packed int3 with zeros": compressed(
        "pack-quantized", num_bits=3, group_size=16, strategy="group", symmetric=False
    ),
    "packed int3": compressed("pack-quantized", num_bits=3, group_size=32, strategy="group"),
    "packed int5": compressed("pack-quantized", num_bits=5, group_size=32, strategy="group"),
    "packed int8": compressed("pack-quantized", num_bits=8, strategy="channel"),
    "packed int4 of a tensor": compressed("pack-quantized", num_bits=4, strategy="tensor"),
    "int8": compressed("int-quantized", num_bits=8, strategy="channel"),
    "int8 with zeros": compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
    "int8 of a tensor": compressed("int-quantized", num_bits=8, strategy="tensor"),
    "int8 g32": compressed("int-quantized", num_bits=8, group_size=32, strategy="group"),
    "naive int4": compressed("naive-quantized", num_bits=4, group_size=32, strategy="group"),
    "fp8 channel": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "fp8 of a tensor": compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "fp8 blocks of compressed-tensors": compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]
    ),
    "fp8 blocks": fp8((32, 32)),
    "fp8 one scale": fp8(None),
}
"""All that activations are left out of, but for "fp8 blocks" and "fp8 one scale"."""
