"""A checkpoint from a source's tensors and their replacements, written one tensor at a time.

Format: 8 bytes little-endian header length, a JSON header with dtype, shape and `data_offsets` of every tensor, the
data (https://github.com/huggingface/safetensors, README, "Format"). The library's own writer wants all tensors of a
file in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from ...cluster.checkpoint_files import INDEX_FILE, SINGLE_FILE, weight_files
from ...cluster.evaluation_report import REPORT_FILE
from .durable_files import publish, reserve, temporary_name, write_text, writing

MAX_FILE_BYTES = 5 * 10**9

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bool: "BOOL",
}
_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a safetensors file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def entries_of(files: Iterable[Path]) -> list[Entry]:
    """The tensors of some safetensors files, by file and name."""
    found = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                piece = file.get_slice(name)
                found.append(Entry(name, path, piece.get_dtype(), tuple(piece.get_shape())))
    return found


def merge(source: Path, replaced: set[str], new: Sequence[Path]) -> list[Entry]:
    """The tensors of a model folder without those that are `replaced`, and the tensors of `new` files, by name. Where
    both have one of a name, the new one counts."""
    entries = {entry.name: entry for entry in entries_of(weight_files(source)) if entry.name not in replaced}
    entries |= {entry.name: entry for entry in entries_of(new)}
    return [entries[name] for name in sorted(entries)]


def divide(entries: Sequence[Entry], max_bytes: int = MAX_FILE_BYTES) -> dict[str, list[Entry]]:
    """Files of at most `max_bytes`, by name, that the tensors go to."""
    files: list[list[Entry]] = [[]]
    for entry in entries:
        if files[-1] and sum(other.nbytes for other in files[-1]) + entry.nbytes > max_bytes:
            files.append([])
        files[-1].append(entry)
    if len(files) == 1:
        return {SINGLE_FILE: files[0]}
    return {f"model-{i:05}-of-{len(files):05}.safetensors": content for i, content in enumerate(files, 1)}


def write_weights(folder: Path, files: Mapping[str, Sequence[Entry]], metadata: Mapping[str, str]) -> None:
    """Write the tensors of each file, and an index if there are several.

    Raises:
        CheckpointError: the disk is full.
    """
    for name, content in files.items():
        _write_file(folder / name, content, metadata)
    if len(files) > 1:
        weight_map = {entry.name: name for name, content in files.items() for entry in content}
        total = sum(entry.nbytes for content in files.values() for entry in content)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for entry in entries:
        offsets = [offset, offset + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = temporary_name(path)
    reserve(temporary, 8 + len(text) + offset)
    with temporary.open("r+b") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for data in _contents(entries):
            file.write(data)
    publish(path)


def _contents(entries: Sequence[Entry]) -> Iterator[memoryview]:
    """The bytes of every tensor in turn."""
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in {e.file for e in entries}}
        for entry in entries:
            tensor = files[entry.file].get_tensor(entry.name)
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def other_files(source: Path) -> list[Path]:
    """What a model folder holds besides weights and config.json: tokenizer, templates, generation defaults. Not what an
    evaluation found out about it: that says nothing of another model."""
    written_anew = ("config.json", INDEX_FILE, REPORT_FILE)
    files = sorted(path for path in source.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    return [path for path in files if path.name not in written_anew]


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy some files under their own names.

    Raises:
        CheckpointError: the disk is full.
    """
    for file in files:
        with writing(folder / file.name, file.stat().st_size):
            shutil.copyfile(file, temporary_name(folder / file.name))
            publish(folder / file.name)
