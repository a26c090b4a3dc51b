"""The JSON files of a model folder, and their fields with a type check that names the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError


def read_json(folder: Path, name: str, *, required: bool) -> dict[str, Any]:
    """The object in `folder/name`; empty if the file is missing and not `required`.

    Raises:
        CheckpointError: the folder or a required file is missing, or the file holds anything but a JSON object.
    """
    path = folder / name
    if not folder.is_dir():
        raise CheckpointError(f"model folder {folder} does not exist")
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path} is missing: {folder} is not a model folder in Hugging Face format")
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a JSON object")
    return config


def mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object; empty where the config has none."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {key} = {value!r}; an object is needed")
    return value


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer; `default` where the config has none."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} = {value!r}; a positive integer is needed")
    return value


def strings(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of strings; empty where the config has none."""
    value = config.get(key) or ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"config.json: {key} = {value!r}; a list of strings is needed")
    return tuple(value)


def two_integers(config: Mapping[str, Any], key: str) -> tuple[int, int]:
    """Two positive integers."""
    value = config.get(key)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise CheckpointError(f"config.json: {key} = {value!r}; two positive integers are needed")
    first, second = (integer({key: item}, key) for item in value)
    return first, second


def number(config: Mapping[str, Any], key: str, default: float | None = None, *, file: str = "config.json") -> float:
    """A number; `default` where the config, read from `file`, has none."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{file}: {key} = {value!r}; a number is needed")
    return float(value)


def optional_number(config: Mapping[str, Any], key: str) -> float | None:
    """A number or None where the config has none."""
    return None if config.get(key) is None else number(config, key)


def token_ids(config: Mapping[str, Any], key: str, *, file: str = "config.json") -> tuple[int, ...]:
    """Token ids written as one integer, a list or null, in a config read from `file`."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) for item in ids):
        raise CheckpointError(f"{file}: {key} = {value!r}; token ids are integers")
    return tuple(ids)
