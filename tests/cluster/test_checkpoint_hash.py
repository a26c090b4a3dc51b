"""A checkpoint's hash changes with its content and with nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raytroupe.cluster.checkpoint_hash import hash_checkpoint
from raytroupe.cluster.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "a.safetensors").write_bytes(bytes(range(256)) * 40_000)
    (path / "b.safetensors").write_bytes(b"more")
    return path


def test_a_changed_byte_changes_the_hash(folder: Path) -> None:
    before = hash_checkpoint(folder)
    content = bytearray((folder / "a.safetensors").read_bytes())
    content[5_000_000] ^= 1
    (folder / "a.safetensors").write_bytes(content)
    assert hash_checkpoint(folder).sha256 != before.sha256


@pytest.mark.parametrize("change", ["rename", "config", "swap"])
def test_names_and_config_count(folder: Path, change: str) -> None:
    before = hash_checkpoint(folder).sha256
    if change == "rename":
        (folder / "b.safetensors").rename(folder / "c.safetensors")
    elif change == "config":
        (folder / "config.json").write_text("{} ")
    else:
        (folder / "a.safetensors").rename(folder / "x")
        (folder / "b.safetensors").rename(folder / "a.safetensors")
        (folder / "x").rename(folder / "b.safetensors")
    assert hash_checkpoint(folder).sha256 != before


def test_time_place_and_other_files_do_not_count(folder: Path) -> None:
    before = hash_checkpoint(folder).sha256
    os.utime(folder / "a.safetensors", ns=(1, 1))
    (folder / "troupe_eval.json").write_text("{}")
    moved = folder.rename(folder.with_name("moved"))
    assert hash_checkpoint(moved).sha256 == before


def test_what_is_known_is_not_read_again_until_it_changes(folder: Path) -> None:
    known = hash_checkpoint(folder)
    status = (folder / "b.safetensors").stat()
    (folder / "b.safetensors").write_bytes(b"else")
    os.utime(folder / "b.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hash_checkpoint(folder, known.files) == known, "same size and time"
    os.utime(folder / "b.safetensors", ns=(1, 1))
    assert hash_checkpoint(folder, known.files).sha256 != known.sha256


def test_sizes(folder: Path) -> None:
    assert hash_checkpoint(folder).weight_file_bytes == 10_240_004


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors files"):
        hash_checkpoint(tmp_path)
