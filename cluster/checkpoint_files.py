"""Which safetensors files of a model folder make up the model."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """Those that the index names; without an index `model.safetensors`; without either every safetensors file.

    Raises:
        CheckpointError: there are none, or the index is damaged or names a missing one.
    """
    index = read_index(folder)
    if index is not None:
        return sorted(set(index.values()))
    single = folder / SINGLE_FILE
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({pickled[0]} is a pickle, which is never loaded: convert it to safetensors)" if pickled else ""
        raise CheckpointError(f"{folder} holds no safetensors files{hint}")
    return files


def read_index(folder: Path) -> dict[str, Path] | None:
    """The file of every tensor, from the folder's index; None without one.

    Raises:
        CheckpointError: the index is damaged or names a missing file.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        file_of = {str(name): folder / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors index: {error!r}") from None
    for file in sorted(set(file_of.values())):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, though {path.name} names it")
    return file_of
