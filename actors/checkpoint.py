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

PACKED = ("qweight", "weight_packed")
"""What stands for a matrix' `weight` where its integers are packed."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a tensor that is not quantised may hold."""

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, its elements in row order and without gaps."""

    path: Path
    offset: int
    """Of the first byte, from the beginning of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]


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

    def holds_weight(self, name: str) -> bool:
        """Whether the matrix `{module}.weight` is there, quantised or not."""
        return any(f"{name.removesuffix('.weight')}.{kind}" in self for kind in ("weight", *PACKED))

    def find(self, name: str) -> StoredTensor:
        """Where a tensor lies, whatever it holds.

        Raises:
            CheckpointError: it is missing, its dtype is not known, or its file is incomplete.
        """
        path = self._file_of.get(name)
        if path is None:
            hint = ""
            if name.endswith(".weight") and self.holds_weight(name):
                hint = ", which holds it quantised, though config.json does not say so"
            raise CheckpointError(f"{self._folder}: tensor {name} is missing from the checkpoint{hint}")
        header = self._header(path)
        entry = header.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{path}: tensor {name} is missing, though the index names this file")
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {entry['dtype']}, which is not supported; known: {', '.join(_DTYPES)}"
            )
        offset = header.data_start + entry["data_offsets"][0]
        return StoredTensor(path, offset, _DTYPES[entry["dtype"]], tuple(entry["shape"]))

    def locate(self, piece: TensorSlice) -> StoredTensor:
        """Where the tensor lies of which `piece` is a part.

        Raises:
            CheckpointError: the tensor is missing, has another shape or not one of the dtypes that it may have, or its
                file is incomplete.
        """
        stored = self.find(piece.name)
        if stored.shape != piece.shape:
            raise CheckpointError(
                f"{stored.path}: tensor {piece.name} has shape {list(stored.shape)}, but config.json implies "
                f"{list(piece.shape)}"
            )
        if stored.dtype not in (piece.dtypes or FLOATS):
            raise CheckpointError(
                f"{stored.path}: tensor {piece.name} has dtype {_name(stored.dtype)}, but config.json implies "
                f"{' or '.join(map(_name, piece.dtypes)) if piece.dtypes else 'a tensor that is not quantised'}"
            )
        return stored

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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
