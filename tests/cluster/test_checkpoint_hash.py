"""A checkpoint's hash changes with its content and with nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from raytroupe.cluster.checkpoint_hash import SETTINGS_FILES, hash_checkpoint
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


@pytest.mark.parametrize("name", SETTINGS_FILES)
def test_settings_count(folder: Path, name: str) -> None:
    before = hash_checkpoint(folder).sha256
    index = '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    (folder / name).write_text(index)
    with_it = hash_checkpoint(folder).sha256
    (folder / name).write_text(index + " ")
    assert len({before, with_it, hash_checkpoint(folder).sha256}) == 3


@pytest.mark.parametrize("change", ["rename", "swap"])
def test_names_count(folder: Path, change: str) -> None:
    before = hash_checkpoint(folder).sha256
    if change == "rename":
        (folder / "b.safetensors").rename(folder / "c.safetensors")
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
    read = hash_checkpoint(folder)
    known = [msgspec.structs.replace(file, sha256=f"known {file.name}") for file in read.files]
    assert hash_checkpoint(folder, known).files == known
    os.utime(folder / "b.safetensors", ns=(1, 1))
    assert [file.sha256 for file in hash_checkpoint(folder, known).files] == [
        "known a.safetensors",
        read.files[1].sha256,
        "known config.json",
    ]


@pytest.mark.parametrize("field", ["name", "size", "mtime_ns", "ctime_ns", "inode"])
def test_all_that_identifies_a_file_is_compared(folder: Path, field: str) -> None:
    read = hash_checkpoint(folder)
    status = (folder / "a.safetensors").stat()
    file = read.files[0]
    assert (file.name, file.size, file.inode) == ("a.safetensors", status.st_size, status.st_ino)
    assert (file.mtime_ns, file.ctime_ns) == (status.st_mtime_ns, status.st_ctime_ns)
    other = "other" if field == "name" else 1
    known = [msgspec.structs.replace(file, sha256="known", **{field: other}) for file in read.files]
    assert hash_checkpoint(folder, known) == read


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_change_is_seen_though_size_and_time_are_set_back(folder: Path, how: str) -> None:
    known = hash_checkpoint(folder)
    file = folder / "b.safetensors"
    status = file.stat()
    written = file if how == "in place" else folder / "other"
    written.write_bytes(b"else")
    os.utime(written, ns=(status.st_atime_ns, status.st_mtime_ns))
    written.replace(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert hash_checkpoint(folder, known.files).sha256 != known.sha256


def test_sizes(folder: Path) -> None:
    assert hash_checkpoint(folder).weight_file_bytes == 10_240_004


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors files"):
        hash_checkpoint(tmp_path)
