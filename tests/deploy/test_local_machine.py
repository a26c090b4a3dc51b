"""What this machine offers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raytroupe.deploy import local_machine


@pytest.mark.parametrize(
    ("quota", "cpus"), [("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 6)]
)
def test_cpus_are_those_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cpus: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(local_machine, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert local_machine.local_capacity().cpus == cpus


@pytest.mark.parametrize(("visible", "gpus"), [(None, 3), ("0,2", 2), ("", 0), ("-1", 0), ("0,1,2,3", 3)])
def test_gpus_are_those_that_may_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int
) -> None:
    for index in range(3):
        (tmp_path / f"0000:0{index}:00.0").mkdir()
    monkeypatch.setattr(local_machine, "_NVIDIA_GPUS", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_machine.local_capacity().gpus == gpus


def test_a_port_that_someone_listens_on_is_not_free() -> None:
    (port,) = local_machine.free_ports(1)
    assert local_machine.port_is_free("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        assert not local_machine.port_is_free("127.0.0.1", port)


def test_free_ports_are_distinct() -> None:
    assert len(set(local_machine.free_ports(50))) == 50


def test_only_the_terminal_sees_what_is_meant_for_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = f"""
import os, pathlib, sys
from raytroupe.deploy.quiet_output import quiet_output
print("before")
with quiet_output(pathlib.Path({str(log)!r})) as terminal:
    print("from Python")
    os.write(2, b"from C\\n")
    os.system("echo from a child")
    print("for the user", file=terminal)
print("afterwards", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "before\nfor the user\n"
    assert done.stderr == "afterwards\n"
    assert set(log.read_text().splitlines()) == {"from Python", "from C", "from a child"}
