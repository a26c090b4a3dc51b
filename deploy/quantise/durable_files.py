"""Files that appear at once and whole, and are still there after a power cut; and what is said of a full disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ...cluster.errors import CheckpointError


@contextlib.contextmanager
def writing(path: Path, nbytes: int) -> Iterator[None]:
    """Around what writes `nbytes` to a file.

    Raises:
        CheckpointError: the system refuses; names the file, the bytes that it needs and those that are free.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(
            f"{path} cannot be written: {reason}; it needs {nbytes:,} bytes, and {free:,} are free there. Make room "
            f"and repeat the command: it goes on where it was"
        ) from None


def reserve(path: Path, nbytes: int) -> None:
    """Make a new file of zeros whose space on the disk is taken already: writing to a mapping of it cannot fail, where
    a full disk would kill the process (SIGBUS).

    Raises:
        CheckpointError: see `writing`.
    """
    with writing(path, nbytes):
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            if nbytes:
                os.posix_fallocate(file.fileno(), 0, nbytes)


def temporary_name(path: Path) -> Path:
    """Where a file is written before `publish` gives it its name."""
    return path.with_name(path.name + ".tmp")


def publish(path: Path) -> None:
    """Give the file at `temporary_name(path)` its name, once all that it holds is on the disk."""
    sync(temporary_name(path))
    os.replace(temporary_name(path), path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file.

    Raises:
        CheckpointError: see `writing`.
    """
    with writing(path, len(text)):
        temporary_name(path).write_text(text, encoding="utf-8")
        publish(path)


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk, what was written through mappings included."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
