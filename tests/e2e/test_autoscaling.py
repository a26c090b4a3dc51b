"""Serve's controller starts and stops replicas as the policy says, from what replicas report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import serve
from ray.serve.schema import ReplicaState

from raytroupe.cluster.autoscaling import replica_metrics
from raytroupe.cluster.config import ModelConfig
from raytroupe.cluster.latency_class import DEFAULT_TARGETS
from raytroupe.deploy.autoscaling import autoscaling_config

from .conftest import Application, eventually

NAME = "scaled"


def deploy(queue: Path) -> None:
    """An application whose replicas report as their queue what the file says."""
    report = replica_metrics

    class Reporting:  # in a function, so that it is pickled by value: workers cannot import tests
        def record_autoscaling_stats(self) -> dict[str, float]:
            return report({"interactive": float(queue.read_text())}, utilisation=0.1)

        async def __call__(self) -> None: ...

    scaling = autoscaling_config(ModelConfig(model="m", max_replicas=2), DEFAULT_TARGETS, settle_seconds=2)
    assert scaling is not None
    scaling.look_back_period_s = 3.0
    deployment = serve.deployment(
        name=NAME, ray_actor_options={"num_cpus": 0}, autoscaling_config=scaling, graceful_shutdown_timeout_s=1
    )(Reporting)
    serve.run(deployment.bind(), name=NAME, route_prefix=None)


@pytest.fixture
def queue(application: Application, tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "queue"
    file.write_text("0")
    deploy(file)
    yield file
    serve.delete(NAME, _blocking=False)  # its replicas drain for half a minute


def test_a_queue_brings_a_replica_and_its_end_removes_it(queue: Path) -> None:
    def replicas() -> int:
        return serve.status().applications[NAME].deployments[NAME].replica_states.get(ReplicaState.RUNNING, 0)

    assert replicas() == 1
    queue.write_text("2.5")
    eventually(lambda: replicas() == 2, 30, lambda: f"{replicas()} replicas")
    queue.write_text("0")
    eventually(lambda: replicas() == 1, 30, lambda: f"{replicas()} replicas")
