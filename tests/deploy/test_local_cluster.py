"""What Ray and Serve are told through the environment."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from raytroupe.actors.placement import Capacity
from raytroupe.cluster.errors import EngineError
from raytroupe.deploy import local_cluster
from raytroupe.deploy.local_cluster import LocalCluster, _calm_background

ASK_RAY = """
from ray._raylet import AuthenticationMode, get_authentication_mode
from ray.serve._private import constants
assert get_authentication_mode() == AuthenticationMode.TOKEN
from ray._private import ray_constants
assert ray_constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S == 0
print(constants.RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S)
"""


def test_authentication_is_on_and_long_streams_outlive_a_change_of_the_proxy() -> None:
    cluster = LocalCluster(Capacity(cpus=2, gpus=0), dashboard_port=8265)
    try:
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", **cluster._environment()}
        done = subprocess.run(
            [sys.executable, "-c", ASK_RAY], env=environment, capture_output=True, text=True, timeout=60
        )
    finally:
        shutil.rmtree(cluster.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3600\n"


def test_processes_that_only_watch_give_way_and_others_do_not(tmp_path: Path) -> None:
    children = []
    for name in ("log_monitor.py", "raylet.py"):
        script = tmp_path / name
        script.write_text("import sys; sys.stdin.read()")
        children.append(subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE))
    started = threading.Event()
    started.set()
    try:
        _calm_background(started)
        ours = psutil.Process().nice()
        assert [psutil.Process(child.pid).nice() for child in children] == [min(19, ours + 10), ours]
    finally:
        for child in children:
            child.communicate()


def test_a_dashboard_that_does_not_come_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_cluster, "_DASHBOARD_SECONDS", 0.1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        cluster = LocalCluster(Capacity(cpus=2, gpus=0), dashboard_port=listener.getsockname()[1])
        try:
            with pytest.raises(EngineError, match="dashboard did not start"):
                cluster.await_dashboard()
            listener.listen()
            cluster.await_dashboard()
        finally:
            shutil.rmtree(cluster.folder)
