"""`troupe serve` as a process: how it ends, and what it says when it cannot start."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from raytroupe.deploy.local_machine import free_ports

DEMO_SMALL = Path(__file__).parents[2] / "deploy" / "demo_models" / "demo-small"


class Command:
    """A `troupe serve` in a process group of its own, as a shell starts it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._output = folder / "output.txt"
        (self.port,) = free_ports(1)
        command = [sys.executable, "-m", "raytroupe.deploy.cli", "serve", "--port", str(self.port), *arguments]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        self.seen: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until `text` has been printed, taking note of all descendants meanwhile."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            self.look()
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)
        self.look()

    def look(self) -> None:
        """Take note of the descendants that are alive now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.seen.setdefault(process.pid, process)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends SIGINT to every process of the group."""
        self.look()
        os.killpg(self.process.pid, signal.SIGINT)

    def runs(self, title: str) -> bool:
        """Whether a descendant with `title` in its command line is alive."""
        for process in self.seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    return True
        return False

    def survivors(self) -> list[str]:
        """Descendants that are still alive."""
        alive = []
        for process in self.seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(str(process))
        return alive


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def start_command(*arguments: str) -> Command:
        commands.append(Command(tmp_path, *arguments))
        return commands[-1]

    yield start_command
    for command in commands:
        if command.process.poll() is None:
            command.process.terminate()
            command.process.wait(60)
        if logs := re.search(r"\(logs: (\S+)\)", command.output):
            shutil.rmtree(logs[1])


def test_interrupt_ends_everything(start: Callable[..., Command]) -> None:
    command = start(str(DEMO_SMALL), "--max-model-len", "256")
    command.wait_for("Ctrl-C ends it.")
    body = {"model": "demo-small", "prompt": "The capital", "max_tokens": 200, "stream": True, "ignore_eos": True}
    url = f"http://127.0.0.1:{command.port}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as stream:  # not even while a request is served
        next(stream.iter_lines())
        assert command.runs("ShardActor")
        assert command.runs("haproxy")
        command.interrupt()
        assert command.process.wait(30) == 130
    assert command.survivors() == []
    assert "Traceback" not in command.output
    assert command.output.rstrip().endswith("Ctrl-C ends it."), "an intended end is no event"


@pytest.mark.parametrize(
    ("moment", "number"),
    [("early", signal.SIGINT), ("early", signal.SIGTERM), ("late", signal.SIGTERM), ("late", signal.SIGKILL)],
)
def test_interrupt_while_starting_ends_everything(
    start: Callable[..., Command], moment: str, number: signal.Signals
) -> None:
    command = start(str(DEMO_SMALL))
    if moment == "early":  # while Ray's own processes are started
        deadline = time.monotonic() + 60
        while not command.runs("gcs_server"):
            command.look()
            assert time.monotonic() < deadline, command.output
            time.sleep(0.05)
    else:
        command.wait_for("Ray is up")
        time.sleep(2)
    command.look()
    os.killpg(command.process.pid, number) if number == signal.SIGINT else command.process.send_signal(number)
    assert command.process.wait(30) == (-number if number == signal.SIGKILL else 130)
    deadline = time.monotonic() + 30  # if the command itself was killed, those below it notice and end by themselves
    while command.survivors() and number == signal.SIGKILL and time.monotonic() < deadline:
        time.sleep(0.1)
    assert command.survivors() == []
    assert "Traceback" not in command.output


def broken_copy(folder: Path, fault: str) -> Path:
    """demo-small with one fault."""
    copy = folder / "broken"
    shutil.copytree(DEMO_SMALL, copy)
    weights = copy / "model.safetensors"
    if fault == "no config":
        (copy / "config.json").unlink()
    elif fault == "damaged config":
        (copy / "config.json").write_text("{")
    elif fault == "unknown architecture":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "architectures": ["HovercraftForCausalLM"]}))
    elif fault == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif fault == "no weights":
        weights.unlink()
    else:
        name = "model.layers.1.mlp.down_proj.weight"
        tensors = load_file(weights)
        if fault == "missing tensor":
            del tensors[name]
        else:
            assert fault == "wrong shape"
            tensors[name] = tensors[name][:-1].contiguous()
        save_file(tensors, weights)
    return copy


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no config", ["config.json is missing"]),
        ("damaged config", ["config.json is not valid JSON"]),
        ("unknown architecture", ["'HovercraftForCausalLM' is not supported; known: ", "LlamaForCausalLM"]),
        ("no weights", ["holds no safetensors files"]),
        ("truncated weights", ["model.safetensors is not a complete safetensors file"]),
        ("missing tensor", ["tensor model.layers.1.mlp.down_proj.weight is missing"]),
        ("wrong shape", ["model.layers.1.mlp.down_proj.weight has shape [127, 384]", "[128, 384]"]),
    ],
)
def test_broken_model_folder_fails_with_one_line(
    start: Callable[..., Command], tmp_path: Path, fault: str, words: list[str]
) -> None:
    command = start(str(broken_copy(tmp_path, fault)))
    deadline = time.monotonic() + 120
    while command.process.poll() is None:
        command.look()
        assert time.monotonic() < deadline, command.output
        time.sleep(0.05)
    assert command.process.returncode in (1, 2)
    lines = command.output.splitlines()
    assert lines[-1].startswith("error: ")
    assert all(word in lines[-1] for word in words), lines[-1]
    assert sum(words[0] in line for line in lines) == 1, "the cause is said once"
    assert "Traceback" not in command.output
    assert command.survivors() == []


def test_missing_model_folder_fails_with_one_line(start: Callable[..., Command]) -> None:
    command = start("./no-such-folder")
    assert command.process.wait(30) == 2
    assert command.output == "error: ./no-such-folder: no such folder\n"


def test_port_in_use_is_refused(start: Callable[..., Command]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = start(str(DEMO_SMALL), "--port", port)
        assert command.process.wait(30) == 2
    assert command.output == f"error: port {port} of 127.0.0.1 is in use; choose another with --port\n"
