"""The first look at weight files finds what is missing or cut off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from raytroupe.cluster.checkpoint_files import weight_files
from raytroupe.cluster.errors import CheckpointError
from raytroupe.deploy.weight_files import check_weight_files

DEMO = Path(__file__).parents[2] / "deploy" / "demo_models"


@pytest.mark.parametrize("name", ["demo-large", "demo-small"])
def test_embedded_models_are_complete(name: str) -> None:
    check_weight_files(DEMO / name)


def test_sharded_checkpoint_is_complete_only_with_all_its_files(tmp_path: Path) -> None:
    for part in ("a", "b"):
        save_file({part: np.zeros((3, 5), np.float32)}, tmp_path / f"{part}.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_weight_files(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing, though model\.safetensors\.index\.json"):
        check_weight_files(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros((64, 64), np.float32)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        check_weight_files(tmp_path)


def test_files_that_are_no_part_of_the_model_are_not_looked_at(tmp_path: Path) -> None:
    save_file({"w": np.zeros((3, 5), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "consolidated.safetensors").write_bytes(b"cut off")
    check_weight_files(tmp_path)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"consolidated\.safetensors is not a complete safetensors file"):
        check_weight_files(tmp_path)


def test_something_else_is_not_taken_for_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((100).to_bytes(8, "little") + b"x" * 200)
    with pytest.raises(CheckpointError, match="its header is damaged"):
        check_weight_files(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors files"):
        check_weight_files(tmp_path)
