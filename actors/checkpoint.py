"""Reading slices of tensors from the safetensors files of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..cluster.checkpoint_files import read_index, weight_files
from ..cluster.errors import CheckpointError
from .weight_names import TensorSlice

REOPEN_AFTER_BYTES = 128 * 2**20
"""Files are mapped, and pages once read count as memory of the process until the file is closed."""
READ_BYTES = 64 * 2**20
"""A slice is copied in pieces of this size, which bounds the memory of a conversion to another dtype."""


class Checkpoint:
    """The tensors of a model folder, by name, wherever they are stored."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: the folder has no safetensors files, or its index names a missing one.
        """
        self._folder = folder
        self._handle: Any = None
        self._handle_file: Path | None = None
        self._bytes_read = 0
        self._file_of = self._find_tensors()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def copy(self, piece: TensorSlice, target: Tensor) -> None:
        """Copy a slice into `target`, of the slice's shape, converting to its dtype and device.

        Raises:
            CheckpointError: the tensor is missing, has another shape or is not floating-point.
        """
        source = self._open(piece)
        step = max(1, READ_BYTES // (max(1, piece.num_columns or 1) * 4))
        for start in range(0, piece.num_rows, step):
            stop = min(start + step, piece.num_rows)
            rows = slice(piece.rows.start + start, piece.rows.start + stop)
            try:
                part = source[rows] if piece.columns is None else source[rows, piece.columns]
            except SafetensorError as error:
                raise CheckpointError(f"{self._handle_file}: cannot read {piece.name}: {error}") from None
            target[start:stop].copy_(part)
            self._bytes_read += part.numel() * part.element_size()
            if self._bytes_read > REOPEN_AFTER_BYTES and stop < piece.num_rows:
                del part
                self.close()
                source = self._open(piece)
        if self._bytes_read > REOPEN_AFTER_BYTES:
            self.close()

    def close(self) -> None:
        """Give the mapped memory back."""
        self._handle = self._handle_file = None
        self._bytes_read = 0

    def _open(self, piece: TensorSlice) -> Any:
        """The lazy slice object of the piece's tensor, its shape checked."""
        path = self._file_of.get(piece.name)
        if path is None:
            raise CheckpointError(f"{self._folder}: tensor {piece.name} is missing from the checkpoint")
        if path != self._handle_file:
            self.close()
            self._handle, self._handle_file = _open_file(path), path
        try:
            source = self._handle.get_slice(piece.name)
        except SafetensorError:
            raise CheckpointError(f"{path}: tensor {piece.name} is missing, though the index names this file") from None
        found = tuple(source.get_shape())
        if found != piece.shape:
            raise CheckpointError(
                f"{path}: tensor {piece.name} has shape {list(found)}, but config.json implies {list(piece.shape)}"
            )
        if source.get_dtype() not in ("F32", "BF16", "F16", "F64"):
            raise CheckpointError(
                f"{path}: tensor {piece.name} has dtype {source.get_dtype()}; quantised checkpoints are not supported"
            )
        return source

    def _find_tensors(self) -> dict[str, Path]:
        index = read_index(self._folder)
        if index is not None:
            return index
        files = weight_files(self._folder)
        return {name: path for path in files for name in _open_file(path).keys()}  # noqa: SIM118 (not a dict)


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from None
