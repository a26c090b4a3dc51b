"""Which tile sizes a kernel runs with on which GPU: `tuning.json`, and how a configuration is looked up in it.

Nothing is tuned while serving: a configuration is looked up once, when weights are loaded. The file has, per kind of
GPU and kernel, entries such as

    {"for": {"dtype": "half"}, "shape": {"outputs": 4096, "inputs": 4096}, "config": {…}, "source": "measured"}

An entry is for one value of everything in `for`. Of the entries whose `for` is the one asked for, the one with the
nearest `shape` counts: the distance is the sum over its sizes of |log2(size asked for / size of the entry)|, so that
the exact shape comes before all others. Of equally near ones, that of this kind of GPU comes before that of a similar
kind (`SIMILAR`), and this before that of `DEFAULT`; then the first in the file. `source` is "measured"
(`python -m raytroupe.deploy.bench.gpu.tune` writes such entries) or "reasoned": never tried on a GPU.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

FILE = Path(__file__).with_name("tuning.json")
DEFAULT = "default"
SIMILAR = {"h200": "h100", "gh200": "h100", "h800": "h100", "h20": "h100", "a800": "a100"}
"""Kind of GPU → the kind with the same multiprocessors whose entries suit it better than the default."""

Config = TypeVar("Config")
Content = dict[str, dict[str, list[dict[str, Any]]]]
"""Kind of GPU → kernel → entries."""


class TuningTable:
    """The entries that count for one kind of GPU."""

    def __init__(self, content: Content, kind: str) -> None:
        kinds = dict.fromkeys((kind, SIMILAR.get(kind, DEFAULT), DEFAULT))
        self._parts = [content[name] for name in kinds if name in content]

    def find(self, kernel: str, make: type[Config], exact: Mapping[str, str | int], shape: Mapping[str, int]) -> Config:
        """The configuration for a kernel.

        Args:
            make: a dataclass with the numbers of the entry's `config` as fields.
            exact: what `for` of an entry must be.
            shape: sizes, at least 1, with the names that the kernel's entries give them.

        Raises:
            LookupError: no entry is for `exact`; the default entries must cover all that the kernels ask for.
        """
        config = self.find_any(kernel, make, exact, shape)
        if config is None:
            raise LookupError(f"tuning.json has no entry of '{kernel}' for {dict(exact)}; add one to '{DEFAULT}'")
        return config

    def find_any(
        self, kernel: str, make: type[Config], exact: Mapping[str, str | int], shape: Mapping[str, int]
    ) -> Config | None:
        """The same; None if no entry is for `exact`."""
        entries = [entry for part in self._parts for entry in part.get(kernel, ()) if entry["for"] == exact]
        if not entries:
            return None
        return make(**min(entries, key=lambda entry: _distance(entry["shape"], shape))["config"])


def _distance(entry: Mapping[str, int], shape: Mapping[str, int]) -> float:
    assert entry.keys() == shape.keys(), f"{sorted(entry)} are not {sorted(shape)}"
    return sum(abs(math.log2(shape[name] / size)) for name, size in entry.items())


def kind_of(name: str) -> str:
    """'NVIDIA H100 80GB HBM3' → 'h100'. The word with the model's number of a name as `torch.cuda.get_device_name`
    gives it, in lower case; the whole name if no word has a digit."""
    words = name.lower().replace("-", " ").split()
    models = [word for word in words if any(c.isdigit() for c in word) and not word.endswith("gb")]
    return models[0] if models else "_".join(words)


@functools.cache
def load_tuning(device: torch.device) -> TuningTable:
    """The table of a device; for a CPU, where kernels are interpreted, the default's."""
    kind = kind_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else DEFAULT
    return TuningTable(read(), kind)


def dtype_name(dtype: torch.dtype) -> str:
    """How entries call a dtype: bfloat16 and float16 take the same tiles."""
    return "half" if dtype.itemsize == 2 else str(dtype).removeprefix("torch.")


def read(path: Path = FILE) -> Content:
    """The whole file."""
    return json.loads(path.read_text())


def replace(content: Content, kind: str, kernel: str, entry: dict[str, Any]) -> None:
    """Put an entry in the place of the one with the same `for` and `shape`, or at the end."""
    entries = content.setdefault(kind, {}).setdefault(kernel, [])
    key = (entry["for"], entry["shape"])
    for index, old in enumerate(entries):
        if (old["for"], old["shape"]) == key:
            entries[index] = entry
            return
    entries.append(entry)


def write(content: Content, path: Path = FILE) -> None:
    """Write the whole file, one entry a line."""
    kinds = []
    for kind, kernels in content.items():
        parts = []
        for kernel, entries in kernels.items():
            lines = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
            parts.append(f"    {json.dumps(kernel)}: [\n{lines}\n    ]")
        kinds.append(f"  {json.dumps(kind)}: {{\n" + ",\n".join(parts) + "\n  }")
    path.write_text("{\n" + ",\n".join(kinds) + "\n}\n")
