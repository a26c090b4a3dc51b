"""A compressed-tensors checkpoint written out in full by the format's own library: what its numbers mean."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def dense_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a quantised model folder, with a `weight` for every module whose weight is packed."""
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    tensors = load_tensors(folder)
    for packed in [name for name in tensors if name.endswith(".weight_packed")]:
        module = packed.removesuffix(".weight_packed")
        parts = {
            name: tensors.pop(f"{module}.{name}")
            for name in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
            if f"{module}.{name}" in tensors
        }
        tensors[f"{module}.weight"] = PackedQuantizationCompressor.decompress(parts, _scheme(config, module))["weight"]
    return tensors


def write_dense_copy(quantised: Path, folder: Path) -> Path:
    """The same model without quantisation, in `folder`."""
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in dense_tensors(quantised).items()}, folder / "model.safetensors"
    )
    config = json.loads((quantised / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _scheme(config: QuantizationConfig, module: str) -> QuantizationScheme:
    """Of a linear module: the group that names it, or else the one for all."""
    named = [scheme for scheme in config.config_groups.values() if module in scheme.targets]
    assert not any(re.fullmatch(entry.removeprefix("re:"), module) for entry in config.ignore)
    return named[0] if named else config.config_groups["group_0"]


def random_tokens(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Sequences of token ids above the special ones, of `length` tokens or one less."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, vocab_size, (length - index % 2,), generator=generator).tolist() for index in range(count)]
