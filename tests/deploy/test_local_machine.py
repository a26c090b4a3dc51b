"""What this machine offers."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raytroupe.cluster.config import ServeConfig, load_config
from raytroupe.cluster.cpu_topology import Cpu, CpuTopology
from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy import local_machine


def configured(**application: object) -> ServeConfig:
    return load_config({"models": [{"model": "a"}], **application})


@pytest.mark.parametrize(("quota", "cpus"), [(None, 6), (2.5, 2), (0.5, 1), (9.0, 6)])
def test_cpus_are_those_of_the_container(monkeypatch: pytest.MonkeyPatch, quota: float | None, cpus: int) -> None:
    topology = CpuTopology(tuple(Cpu(node=0, core=number, id=number) for number in range(6)), quota)
    monkeypatch.setattr(local_machine, "read_topology", lambda: topology)
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
    port, dashboard_port = local_machine.free_ports(2)
    config = configured(port=port, dashboard_port=dashboard_port)
    assert local_machine.check_ports(config) == config
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError) as refused:
        local_machine.check_ports(config)
    assert str(refused.value) == f"port {port} of 127.0.0.1 is in use; choose another with --port"
    with socket.create_server(("127.0.0.1", dashboard_port)), pytest.raises(ConfigError) as refused:
        local_machine.check_ports(config)
    assert str(refused.value) == (
        f"port {dashboard_port} of 127.0.0.1 is in use; choose another for Ray's dashboard with --dashboard-port"
    )


def test_a_dashboard_port_that_nobody_chose_gives_way() -> None:
    port, dashboard_port = local_machine.free_ports(2)
    unchosen = configured(port=port).model_copy(update={"dashboard_port": dashboard_port})
    unchosen.model_fields_set.discard("dashboard_port")
    assert local_machine.check_ports(unchosen).dashboard_port == dashboard_port
    with socket.create_server(("127.0.0.1", dashboard_port)):
        assert local_machine.check_ports(unchosen).dashboard_port not in (port, dashboard_port)


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ("no-such-host.invalid", "host 'no-such-host.invalid' cannot be resolved"),
        ("203.0.113.77", "host '203.0.113.77' is no address of this machine"),
    ],
)
def test_a_host_that_is_none_of_this_machine_is_not_a_port_in_use(host: str, named: str) -> None:
    (port,) = local_machine.free_ports(1)
    with pytest.raises(ConfigError) as refused:
        local_machine.check_ports(configured(host=host, port=port))
    assert str(refused.value).startswith(named)
    assert "--host" in str(refused.value)


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
