"""What a quantisation has done so far, so that it can be taken up again after it was killed.

    OUT/.partial/options.json         what this is: all options and the source's files
                 hidden-00003.bin     hidden states of the calibration sequences before layer 3
                 layer-00002.safetensors     finished layers; each appears at once, after the hidden states behind it
                 written.json         names of the files of OUT that the quantised model consists of

OUT has no config.json until everything else is there, so that nothing takes it for a model. When it has, the folder is
renamed before it is emptied, so that no part of it is ever taken for the whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...cluster.errors import ConfigError
from .durable_files import publish, sync, temporary_name, write_text, writing

FOLDER = ".partial"
DISCARDED = ".partial-discarded"


class PartialResult:
    """The folder of an unfinished quantisation."""

    def __init__(self, out: Path, identity: dict[str, Any], *, restart: bool = False) -> None:
        """
        Args:
            identity: JSON of all that decides about the result.
            restart: throw away what was done with other options.

        Raises:
            ConfigError: `out` cannot be written, is finished, holds something else, or what was begun with another
                identity.
        """
        self.out = out
        self.folder = out / FOLDER
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file; name a folder for the quantised model")
        try:
            self._take_up(identity, restart)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{out} cannot be written: {error}; name another folder") from None
        write_text(self._options, json.dumps(identity, indent=1, sort_keys=True))

    def _take_up(self, identity: dict[str, Any], restart: bool) -> None:
        shutil.rmtree(self.out / DISCARDED, ignore_errors=True)
        if self.folder.is_dir() and (restart or not self._options.is_file()):
            self._remove_output()
            self.remove()
        elif self._options.is_file():
            _check_same(self.out, json.loads(self._options.read_text()), identity)
        elif (self.out / "config.json").is_file():
            raise ConfigError(f"{self.out} holds a finished model; name another folder for the new one, or remove it")
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise ConfigError(
                f"{self.out} exists and is not empty; name another folder for the quantised model, or remove it"
            )

    def layers_done(self) -> int:
        """How many layers, from the first on, are finished."""
        count = 0
        while self._layer(count).is_file():
            count += 1
        return count

    def save_layer(self, index: int, tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
        """Finish a layer: its tensors by their names in the checkpoint, and JSON about it.

        Raises:
            CheckpointError: the disk is full.
        """
        file, behind = self._layer(index), self.hidden_states(index + 1)
        with writing(file, sum(tensor.nbytes for tensor in tensors.values())):
            if behind.is_file():
                sync(behind)
            save_file(tensors, temporary_name(file), {"figures": json.dumps(figures)})
            publish(file)
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

    def announce_output(self, names: Sequence[str]) -> None:
        """Say which files of `out` will be written, so that a restart knows them from others."""
        write_text(self._written, json.dumps(sorted(names)))

    def _remove_output(self) -> None:
        """Remove the files of `out` that were announced, first the one that makes them a model."""
        names = json.loads(self._written.read_text()) if self._written.is_file() else []
        for name in sorted(names, key=lambda name: name != "config.json"):
            for file in (self.out / name, temporary_name(self.out / name)):
                file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Nothing of this is needed any more."""
        self.folder.rename(self.out / DISCARDED)
        shutil.rmtree(self.out / DISCARDED)

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer-{index:05}.safetensors"

    @property
    def _options(self) -> Path:
        return self.folder / "options.json"

    @property
    def _written(self) -> Path:
        return self.folder / "written.json"


def _check_same(out: Path, begun: dict[str, Any], identity: dict[str, Any]) -> None:
    differing = sorted(key for key in {*begun, *identity} if begun.get(key) != identity.get(key))
    if differing:
        changes = ", ".join(f"{key} {begun.get(key)!r} → {identity.get(key)!r}" for key in differing)
        raise ConfigError(
            f"{out} holds a quantisation that was begun otherwise ({changes}); repeat the command that began it, use "
            f"--restart to begin anew, or name another folder"
        )
