"""A first look at a model's safetensors files, without torch: are they all there, and complete?

What a shard would find out after half a minute of starting is found out at once. Names and shapes of the tensors are
checked by the shards themselves (`actors/checkpoint.py`).

Format: 8 bytes little-endian header length, a JSON header with `data_offsets` of every tensor, the data
(https://github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from ..cluster.checkpoint_files import weight_files
from ..cluster.errors import CheckpointError

_HEADER_LIMIT = 100_000_000
"""Bytes; the format's own limit."""


def check_weight_files(folder: Path) -> None:
    """
    Raises:
        CheckpointError: names the file that is missing, truncated or no safetensors file.
    """
    for file in weight_files(folder):
        _check_complete(file)


def _check_complete(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(f"{file} is not a complete safetensors file: {size} bytes, and no header in them")
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            promised = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise CheckpointError(f"{file} is not a safetensors file: its header is damaged") from None
    if size < promised:
        raise CheckpointError(
            f"{file} is not a complete safetensors file: {size} bytes, and its header promises {promised}"
        )
