"""Where the tensors of a model folder lie in its safetensors files.

Format: 8 bytes little-endian header length, a JSON header with dtype, shape and `data_offsets` of every tensor, the
data (https://github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..cluster.checkpoint_files import read_index, weight_files
from ..cluster.errors import CheckpointError
from .weight_names import TensorSlice

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, its elements in row order and without gaps."""

    path: Path
    offset: int
    """Of the first byte, from the beginning of the file."""
    dtype: torch.dtype


class Checkpoint:
    """The tensors of a model folder, by name, wherever they are stored. Holds no file open."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: the folder has no safetensors files, or its index names a missing one.
        """
        self._folder = folder
        self._headers: dict[Path, _Header] = {}
        index = read_index(folder)
        if index is None:
            index = {name: path for path in weight_files(folder) for name in self._header(path).entries}
        self._file_of = index

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def locate(self, piece: TensorSlice) -> StoredTensor:
        """Where the tensor lies of which `piece` is a part.

        Raises:
            CheckpointError: the tensor is missing, has another shape or is not floating-point, or its file is
                incomplete.
        """
        path = self._file_of.get(piece.name)
        if path is None:
            raise CheckpointError(f"{self._folder}: tensor {piece.name} is missing from the checkpoint")
        header = self._header(path)
        entry = header.entries.get(piece.name)
        if entry is None:
            raise CheckpointError(f"{path}: tensor {piece.name} is missing, though the index names this file")
        if tuple(entry["shape"]) != piece.shape:
            raise CheckpointError(
                f"{path}: tensor {piece.name} has shape {entry['shape']}, but config.json implies {list(piece.shape)}"
            )
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {piece.name} has dtype {entry['dtype']}; quantised checkpoints are not supported"
            )
        return StoredTensor(path, header.data_start + entry["data_offsets"][0], _DTYPES[entry["dtype"]])

    def _header(self, path: Path) -> _Header:
        if path not in self._headers:
            self._headers[path] = _read_header(path)
        return self._headers[path]


@dataclasses.dataclass(frozen=True, slots=True)
class _Header:
    entries: dict[str, dict]
    """By tensor: `dtype`, `shape` and `data_offsets`."""
    data_start: int
    """Bytes from the beginning of the file to what `data_offsets` count from."""


def _read_header(path: Path) -> _Header:
    try:
        with safe_open(path, framework="pt"):  # checks the whole header against the file's size
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from None
    entries.pop("__metadata__", None)
    return _Header(entries, 8 + length)
