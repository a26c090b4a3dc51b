"""How the application is put together, without a cluster."""

from __future__ import annotations

import pytest

from raytroupe.actors.placement import Capacity
from raytroupe.cluster.config import ModelConfig, ServeConfig
from raytroupe.deploy.app import build_application
from raytroupe.deploy.model_folder import DEMO_MODELS
from raytroupe.deploy.served_model import resolve_models


@pytest.mark.parametrize(("max_num_waiting", "replicas", "queued"), [(10, 1, 1024), (1024, 2, 2048), (3000, 1, 3000)])
def test_calls_do_not_pile_up_without_limit_before_a_model_without_replicas(max_num_waiting, replicas, queued) -> None:
    model = ModelConfig(model=DEMO_MODELS[0], max_num_waiting=max_num_waiting, replicas=replicas)
    served = resolve_models([model], Capacity(cpus=8, gpus=0))
    ingress = build_application(ServeConfig(models=[model]), served, None)._bound_deployment
    (scheduler,) = ingress.init_args[1]
    assert scheduler._bound_deployment.max_queued_requests == queued
