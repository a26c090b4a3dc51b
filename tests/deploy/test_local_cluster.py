"""What Ray and Serve are told through the environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from raytroupe.actors.placement import Capacity
from raytroupe.deploy.local_cluster import LocalCluster

ASK_RAY = """
from ray._raylet import AuthenticationMode, get_authentication_mode
from ray.serve._private import constants
assert get_authentication_mode() == AuthenticationMode.TOKEN
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
