"""The quantised model's folder, from the source and the finished layers."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ... import __version__
from ...actors.weight_names import WeightNames
from ...cluster.checkpoint_config import read_json
from ...cluster.checkpoint_files import INDEX_FILE, weight_files
from .checkpoint_writer import Entry, copy_files, divide, entries_of, merge, other_files, write_weights
from .compressed_tensors import quantization_config
from .durable_files import write_text
from .options import QuantiseOptions
from .partial import PartialResult
from .summary import Sizes


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSizes:
    """What became smaller, and by how much."""

    layers: Sizes
    """The quantised weights of the layers."""
    model: Sizes
    """All tensors."""


def assemble(
    source: Path, partial: PartialResult, options: QuantiseOptions, names: WeightNames, quantised: Sequence[str]
) -> ModelSizes:
    """Write weights, tokenizer and the like to the quantised model's folder, and last its config.json.

    Args:
        partial: all layers, with what stands for the quantised weights and with tensors that have changed.
        quantised: those weights of the source.

    Raises:
        CheckpointError: the disk is full.
    """
    before, after = entries_of(weight_files(source)), merge(source, set(quantised), partial.layer_files())
    files, others = divide(after), other_files(source)
    partial.announce_output(["config.json", INDEX_FILE, *files, *(path.name for path in others)])
    metadata = {"quantised_by": f"troupe {__version__}", "method": str(options.method), "seed": str(options.seed)}
    write_weights(partial.out, files, metadata)
    copy_files(others, partial.out)
    config = read_json(source, "config.json", required=True)
    embedding, head = names.embedding()[0].name, names.head()[0].name
    if head == embedding:
        head = "lm_head.weight"
    heads = list(dict.fromkeys([_module(head), "lm_head"]))  # transformers calls it so, wherever the checkpoint has it
    kept = set(_ignored(_matrices_left(before, {*quantised, embedding, head}), _module(embedding)))
    if head not in quantised:
        kept.update(heads)
    config["quantization_config"] = quantization_config(options, sorted(kept), heads)
    write_text(partial.out / "config.json", json.dumps(config, indent=2) + "\n")
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


def _ignored(modules: Iterable[str], embedding: str) -> Iterator[str]:
    """What `ignore` says of these modules: the decoder's by name; others, such as a vision tower's, by a pattern for
    the part of the model that they belong to, since transformers puts such parts elsewhere than checkpoints do."""
    decoder = embedding.removesuffix("embed_tokens")
    for module in modules:
        if module.startswith(decoder):
            yield module
        else:
            part = module.removeprefix("model.").partition(".")[0]
            yield rf"re:(.*\.)?{re.escape(part)}(\..*)?$"


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _nbytes(entries: Sequence[Entry], modules: set[str]) -> int:
    """Bytes of the modules' tensors, biases aside."""
    return sum(entry.nbytes for entry in entries if _module(entry.name) in modules and not entry.name.endswith(".bias"))
