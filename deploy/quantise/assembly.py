"""The quantised model's folder, from the source and the finished layers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ... import __version__
from ...actors.weight_names import WeightNames
from ...cluster.checkpoint_config import read_json
from ...cluster.checkpoint_files import weight_files
from .checkpoint_writer import Entry, copy_other_files, entries_of, merge, write_weights
from .compressed_tensors import quantization_config
from .options import QuantiseOptions
from .summary import Sizes


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSizes:
    """What became smaller, and by how much."""

    layers: Sizes
    """The quantised weights of the layers."""
    model: Sizes
    """All tensors."""


def assemble(
    source: Path,
    out: Path,
    options: QuantiseOptions,
    names: WeightNames,
    quantised: Sequence[str],
    files: Sequence[Path],
) -> ModelSizes:
    """Write weights, tokenizer and the like to `out`, and last its config.json.

    Args:
        quantised: weights of the source that others stand for.
        files: safetensors files with those others, and with tensors that have changed.
    """
    before, after = entries_of(weight_files(source)), merge(source, set(quantised), files)
    metadata = {"quantised_by": f"troupe {__version__}", "method": str(options.method), "seed": str(options.seed)}
    write_weights(out, after, metadata)
    copy_other_files(source, out)
    config = read_json(source, "config.json", required=True)
    embedding, head = names.embedding()[0].name, names.head()[0].name
    if head == embedding:
        head = "lm_head.weight"
    kept = _matrices_left(before, {*quantised, embedding})
    if head not in quantised:
        kept.add(_module(head))
    config["quantization_config"] = quantization_config(options, sorted(kept), _module(head))
    temporary = out / "config.json.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(temporary, out / "config.json")
    of_layers = {_module(name) for name in quantised} - {_module(head)}
    return ModelSizes(
        layers=Sizes(_nbytes(before, of_layers), _nbytes(after, of_layers)),
        model=Sizes(sum(entry.nbytes for entry in before), sum(entry.nbytes for entry in after)),
    )


def _matrices_left(entries: Sequence[Entry], others: set[str]) -> set[str]:
    """Modules whose matrix stays as it is."""
    return {
        _module(entry.name)
        for entry in entries
        if len(entry.shape) == 2 and entry.name.endswith(".weight") and entry.name not in others
    }


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _nbytes(entries: Sequence[Entry], modules: set[str]) -> int:
    """Bytes of the modules' tensors, biases aside."""
    return sum(entry.nbytes for entry in entries if _module(entry.name) in modules and not entry.name.endswith(".bias"))
