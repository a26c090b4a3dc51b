"""What identifies a checkpoint's content: a hash over all files that its answers depend on, whatever the folder is
called and whenever it was copied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from .checkpoint_files import INDEX_FILE, weight_files
from .errors import CheckpointError

SETTINGS_FILES = (
    "config.json",
    INDEX_FILE,
    "quantize_config.json",
    "quant_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Beside the weights: which tensor is where and how it is quantised, what is a token, a chat and the end of a reply.
Those that there are count."""

_READERS = 8
_READ_BYTES = 4 * 2**20


class HashedFile(msgspec.Struct, frozen=True):
    """One file at the time when it was read. All but the hash is to tell whether it is still the same."""

    name: str
    """Relative to the folder."""
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    sha256: str


class CheckpointHash(msgspec.Struct, frozen=True):
    """A checkpoint's content."""

    sha256: str
    """Over the names and hashes of the files."""
    files: list[HashedFile]

    @property
    def weights(self) -> frozenset[str]:
        """Hashes of the safetensors files."""
        return frozenset(file.sha256 for file in self.files if file.name.endswith(".safetensors"))

    @property
    def weight_file_bytes(self) -> int:
        """Size of the safetensors files."""
        return sum(file.size for file in self.files if file.name.endswith(".safetensors"))


def hash_checkpoint(folder: Path, known: Sequence[HashedFile] = ()) -> CheckpointHash:
    """Hash the safetensors files and those of `SETTINGS_FILES`, several at once.

    Args:
        known: hashes from before. A file of the same name, size, times of change and inode is not read again.

    Raises:
        CheckpointError: the folder holds no weights, or a file cannot be read.
    """
    hashes = {msgspec.structs.replace(file, sha256=""): file for file in known}

    def hash_file(path: Path) -> HashedFile:
        status = path.stat()
        name = path.relative_to(folder).as_posix()
        file = HashedFile(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, "")
        return hashes.get(file) or msgspec.structs.replace(file, sha256=_sha256(path))

    settings = [folder / name for name in SETTINGS_FILES if (folder / name).is_file()]
    try:
        with ThreadPoolExecutor(_READERS, "hash") as threads:
            files = sorted(threads.map(hash_file, [*settings, *weight_files(folder)]), key=lambda file: file.name)
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
