"""What a quantisation has done so far, so that it can be taken up again after it was killed.

    OUT/.partial/options.json         what this is: all options and the source's files
                 hidden-00003.bin     hidden states of the calibration sequences before layer 3
                 layer-00002.safetensors     finished layers; each appears at once, after the hidden states behind it

OUT has no config.json until everything else is there, so that nothing takes it for a model.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...cluster.errors import ConfigError

FOLDER = ".partial"


class PartialResult:
    """The folder of an unfinished quantisation."""

    def __init__(self, out: Path, identity: dict[str, Any], *, restart: bool = False) -> None:
        """
        Args:
            identity: JSON of all that decides about the result.
            restart: throw away what was done with other options.

        Raises:
            ConfigError: `out` holds something else, or what was begun with another identity.
        """
        self.folder = out / FOLDER
        file = self.folder / "options.json"
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file; name a folder for the quantised model")
        if restart and self.folder.is_dir():
            shutil.rmtree(self.folder)
        elif file.is_file():
            _check_same(out, json.loads(file.read_text()), identity)
        elif out.is_dir() and any(out.iterdir()):
            raise ConfigError(
                f"{out} exists and is not empty; name another folder for the quantised model, or remove it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(file, json.dumps(identity, indent=1, sort_keys=True))

    def layers_done(self) -> int:
        """How many layers, from the first on, are finished."""
        count = 0
        while self._layer(count).is_file():
            count += 1
        return count

    def save_layer(self, index: int, tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
        """Finish a layer: its tensors by their names in the checkpoint, and JSON about it."""
        file = self._layer(index)
        save_file(tensors, file.with_suffix(".tmp"), {"figures": json.dumps(figures)})
        os.replace(file.with_suffix(".tmp"), file)
        self.hidden_states(index).unlink(missing_ok=True)

    def figures(self, index: int) -> dict[str, Any]:
        """The JSON about a finished layer."""
        with safe_open(self._layer(index), framework="pt") as file:
            return json.loads(file.metadata()["figures"])

    def layer_files(self) -> list[Path]:
        """Files of the finished layers."""
        return [self._layer(index) for index in range(self.layers_done())]

    def hidden_states(self, index: int) -> Path:
        """The file of the hidden states that layer `index` starts from."""
        return self.folder / f"hidden-{index:05}.bin"

    def remove(self) -> None:
        """The result is complete."""
        shutil.rmtree(self.folder)

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer-{index:05}.safetensors"


def _check_same(out: Path, begun: dict[str, Any], identity: dict[str, Any]) -> None:
    differing = sorted(key for key in {*begun, *identity} if begun.get(key) != identity.get(key))
    if differing:
        changes = ", ".join(f"{key} {begun.get(key)!r} → {identity.get(key)!r}" for key in differing)
        raise ConfigError(
            f"{out} holds a quantisation that was begun otherwise ({changes}); repeat the command that began it, use "
            f"--restart to begin anew, or name another folder"
        )


def _write(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)
