"""What identifies a checkpoint's content: a hash over its weights and their configuration, whatever the folder is
called and whenever it was copied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from .checkpoint_files import INDEX_FILE, weight_files
from .errors import CheckpointError

_READERS = 8
_READ_BYTES = 4 * 2**20


class HashedFile(msgspec.Struct, frozen=True):
    """One file at the time when it was read."""

    name: str
    """Relative to the folder."""
    size: int
    mtime_ns: int
    sha256: str


class CheckpointHash(msgspec.Struct, frozen=True):
    """A checkpoint's content."""

    sha256: str
    """Over the names and hashes of the files."""
    files: list[HashedFile]

    @property
    def weight_file_bytes(self) -> int:
        """Size of the safetensors files."""
        return sum(file.size for file in self.files if file.name.endswith(".safetensors"))


def hash_checkpoint(folder: Path, known: Sequence[HashedFile] = ()) -> CheckpointHash:
    """Hash `config.json`, the index if there is one, and the safetensors files, several at once.

    Args:
        known: hashes from before. A file of the same name, size and time of change is not read again.

    Raises:
        CheckpointError: the folder holds no weights, or a file cannot be read.
    """
    hashes = {(file.name, file.size, file.mtime_ns): file for file in known}

    def hash_file(path: Path) -> HashedFile:
        status = path.stat()
        name = path.relative_to(folder).as_posix()
        found = hashes.get((name, status.st_size, status.st_mtime_ns))
        return found or HashedFile(name, status.st_size, status.st_mtime_ns, _sha256(path))

    names = [folder / name for name in ("config.json", INDEX_FILE) if (folder / name).is_file()]
    try:
        with ThreadPoolExecutor(_READERS, "hash") as threads:
            files = sorted(threads.map(hash_file, [*names, *weight_files(folder)]), key=lambda file: file.name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None
    listing = "".join(f"{file.sha256}  {file.name}\n" for file in files)
    return CheckpointHash(hashlib.sha256(listing.encode()).hexdigest(), files)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
