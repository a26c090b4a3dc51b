"""A quantisation that was interrupted, wherever that was, ends in the same bytes; or it says why it cannot."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dense_copy import random_tokens
from tiny_models import make_tiny_model

from raytroupe.cluster.errors import CheckpointError, ConfigError
from raytroupe.cluster.model_spec import load_spec
from raytroupe.deploy.quantise import checkpoint_writer, hidden_states
from raytroupe.deploy.quantise.options import Method, QuantiseOptions
from raytroupe.deploy.quantise.quantiser import Quantiser

SEQUENCES = random_tokens(6, 40, 131)


def quantise(source: Path, out: Path, method: str = "gptq", sequences=SEQUENCES, bits: int = 4, **arguments) -> None:
    Quantiser(source, out, QuantiseOptions(Method(method), bits, 8), sequences, **arguments).run()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


class Killer:
    """Notes what a run does to the files of a folder, and ends it before one of these deeds."""

    def __init__(self) -> None:
        self._active = False
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watch(self, folder: Path, before: int | str | None = None) -> Iterator[list[str]]:
        """Yields the deeds.

        Args:
            before: number or name of the deed that is not done any more.
        """
        self._deeds: list[str] = []
        self._folder, self._before, self._active = folder, before, True
        try:
            yield self._deeds
        finally:
            self._active = False

    def report(self, what: str, done: float) -> None:
        """Progress counts too: hidden states are written through a mapping, which no hook sees."""
        if self._active:
            self._note(f"report {what}")

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._active or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        if event == "open" and args[1] == "r":
            return
        if str(self._folder) in str(args[0]) or event in ("os.remove", "os.rmdir"):  # rmtree gives bare names
            self._note(f"{event} {Path(os.fsdecode(args[0])).name}")

    def _note(self, deed: str) -> None:
        if self._before in (len(self._deeds), deed):
            self._active = False
            raise Killed
        self._deeds.append(deed)


@pytest.fixture(scope="module")
def killer() -> Killer:
    return Killer()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of two layers, calibrated in batches of two sequences. Nothing waits for the disk: the system's cache
    outlives a process that is killed."""
    monkeypatch.setattr(hidden_states, "BATCH_TOKENS", 80)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder = make_tiny_model("llama3", tmp_path / "source", num_hidden_layers=2)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def kill_everywhere(killer: Killer, deeds: list[str], whole: Path, begin: Callable[[Path], None], **arguments) -> None:
    """End a run before each of its deeds, and repeat the command: it ends in `whole`, and until then OUT is no model.

    Args:
        begin: makes OUT what the run finds.
    """
    expected = contents(whole)
    for number, deed in enumerate(deeds):
        out = whole.parent / f"killed-{number}"
        begin(out)
        with pytest.raises(Killed), killer.watch(out, number):
            quantise(whole.parent / "source", out, report=killer.report, **arguments)
        if (out / "config.json").is_file() and deed != deeds[0]:
            assert contents(out).items() >= expected.items(), deed
        if (out / "config.json").is_file() and not (out / ".partial").exists():
            with pytest.raises(ConfigError, match="holds a finished model"):
                quantise(whole.parent / "source", out, **arguments)
        else:
            quantise(whole.parent / "source", out, **arguments)
        assert contents(out) == expected, deed


def test_killed_anywhere_a_run_ends_in_the_same_bytes(killer: Killer, source: Path, tmp_path: Path) -> None:
    with killer.watch(tmp_path / "whole") as deeds:
        quantise(source, tmp_path / "whole", report=killer.report)
    points = [
        "open hidden-00001.bin",
        "report layer 1 of 2",  # while hidden states are written
        "report layer 1 of 2",
        "open hidden-00001.bin",  # they are written, and their layer is not
        "os.rename layer-00000.safetensors.tmp",
        "os.rename model.safetensors.tmp",  # while the model is put together
        "os.rename tokenizer_config.json.tmp",
        "os.rename config.json.tmp",
        "os.rename .partial",
        "os.remove layer-00000.safetensors",  # while what is not needed any more is removed
        "os.remove options.json",
    ]
    remaining = iter(deeds)
    assert [point for point in points if point not in remaining] == []
    kill_everywhere(killer, deeds, tmp_path / "whole", lambda out: None)


def test_killed_anywhere_a_restart_ends_in_the_same_bytes(killer: Killer, source: Path, tmp_path: Path) -> None:
    quantise(source, tmp_path / "whole")
    earlier = tmp_path / "earlier"
    with pytest.raises(Killed), killer.watch(earlier, "os.rename .partial"):
        quantise(source, earlier, bits=8)
    shutil.copytree(earlier, tmp_path / "other")
    with killer.watch(tmp_path / "other") as deeds:
        quantise(source, tmp_path / "other", restart=True)
    anew = deeds[: deeds.index("os.rename options.json.tmp") + 1]
    assert anew[0] == "os.remove config.json", "it is no model from here on"
    kill_everywhere(killer, anew, tmp_path / "whole", lambda out: shutil.copytree(earlier, out), restart=True)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_finished_layers_are_not_done_again(method: str, tmp_path: Path) -> None:
    source = make_tiny_model("llama3", tmp_path / "source")
    quantise(source, tmp_path / "whole", method)

    for stop in ("layer 3", "writing"):
        with pytest.raises(Killed):
            quantise(source, tmp_path / "parts", method, report=stop_in(stop))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_spec(tmp_path / "parts")
    seen: list[str] = []
    quantise(source, tmp_path / "parts", method, report=lambda what, done: seen.append(what))
    assert set(seen) == {"writing"}
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def stop_in(layer: str) -> Callable[[str, float], None]:
    def report(what: str, done: float) -> None:
        if what.startswith(layer):
            raise Killed

    return report


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, file.stat().st_size - 4)])
def test_hidden_states_that_are_gone_are_not_taken_for_zeros(damage: Callable[[Path], None], tmp_path: Path) -> None:
    source, out = make_tiny_model("llama", tmp_path / "source"), tmp_path / "out"
    with pytest.raises(Killed):
        quantise(source, out, report=stop_in("layer 2"))
    damage(out / ".partial" / "hidden-00001.bin")
    with pytest.raises(CheckpointError, match=r"hidden-00001\.bin (is missing|has .* instead of).*--restart"):
        quantise(source, out)
    quantise(source, out, restart=True)
    assert load_spec(out).quantisation is not None


def test_a_layer_is_finished_only_after_the_hidden_states_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_replace(first: Path, second: Path) -> None:
        order.append(f"name {second.name}")
        replace(first, second)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    quantise(make_tiny_model("llama", tmp_path / "source", num_hidden_layers=2), tmp_path / "out")
    layer = order.index("name layer-00000.safetensors")
    assert {"sync hidden-00001.bin", "sync layer-00000.safetensors.tmp"} <= set(order[:layer])
    config = order.index("name config.json")
    assert {"sync model.safetensors.tmp", "sync config.json.tmp"} <= set(order[:config])


def test_an_unfinished_run_goes_on_only_as_it_began(tmp_path: Path) -> None:
    source, out = make_tiny_model("llama", tmp_path / "source"), tmp_path / "out"
    with pytest.raises(Killed):
        quantise(source, out, report=stop_in("layer 1"))
    with pytest.raises(ConfigError, match=r"bits 4 → 8.*--restart"):
        quantise(source, out, bits=8)
    with pytest.raises(ConfigError, match="calibration_tokens"):
        quantise(source, out, sequences=SEQUENCES[1:])
    quantise(source, out, bits=8, restart=True)
    assert load_spec(out).num_layers == 4
    with pytest.raises(ConfigError, match="holds a finished model"):
        quantise(source, out, bits=8)


def test_a_restart_leaves_nothing_of_an_earlier_model(
    killer: Killer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    make_tiny_model("llama", first)
    make_tiny_model("llama3", second)
    (first / "chat_template.jinja").write_text("the first one's")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.divide, "__defaults__", (20_000,))
        with pytest.raises(Killed), killer.watch(out, "os.rename .partial"):
            quantise(first, out)
    assert (out / "model.safetensors.index.json").is_file(), "several files"
    (out / "letter.txt").write_text("mine")
    quantise(second, out, restart=True)
    quantise(second, tmp_path / "fresh")
    assert contents(out) == {**contents(tmp_path / "fresh"), "letter.txt": b"mine"}


@pytest.mark.parametrize(
    ("method", "room", "file"),
    [
        ("gptq", 30_000, ".partial/hidden-00000.bin"),
        ("rtn", 5_000, ".partial/layer-00000.safetensors"),
        ("rtn", 30_000, "model.safetensors.tmp"),
    ],
)
def test_a_full_disk_is_an_error_that_says_what_is_needed(method: str, room: int, file: str, tmp_path: Path) -> None:
    """No file may grow beyond the room, in bytes: the system refuses as a full disk does."""
    source, out = make_tiny_model("llama", tmp_path / "source"), tmp_path / "out"
    sequences = None if method == "rtn" else SEQUENCES
    quantise(source, tmp_path / "whole", method, sequences)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(CheckpointError, match=rf"out/{file} cannot be written: .*; it needs [\d,]+ bytes, and"):
            quantise(source, out, method, sequences)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    quantise(source, out, method, sequences)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    source, out = make_tiny_model("llama", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        quantise(source, out, "rtn", None, restart=True)
    assert [path.name for path in out.iterdir()] == ["letter.txt"]
