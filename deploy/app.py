"""The composition root: from what is to be served to one Ray Serve application.

```
            ┌─▶ demo-large (SchedulerReplica × replicas) ─▶ shard actors
Ingress ────┤
 (FastAPI)  └─▶ demo-small (SchedulerReplica × replicas) ─▶ shard actors
```
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application
from ray.serve.request_router import RequestRouter

from ..actors.placement import SCHEDULER_CPUS, replica_bundles
from ..actors.scheduler import SchedulerReplica
from ..cluster.config import ServeConfig
from ..cluster.messages import Endpoint
from ..router.ingress import Ingress
from ..router.request_router import ChosenReplica
from .autoscaling import autoscaling_config
from .routing.classifier_file import read_classifier
from .served_model import ServedModel

APPLICATION = "troupe"

_UNLIMITED = 1_000_000
"""Concurrent calls. The scheduler itself bounds its queue (`max_num_waiting`) and answers with QueueFull."""
_MIN_QUEUED_REQUESTS = 1024
"""Calls that an ingress holds while no replica is there to accept them, at least; those beyond get QueueFull."""
_HEALTH_PERIOD_SECONDS = 2.0
_DRAIN_SECONDS = 5.0


def build_application(
    config: ServeConfig,
    models: Sequence[ServedModel],
    listener: Endpoint | None,
    request_router: type[RequestRouter] | str | None = None,
) -> Application:
    """One ingress deployment and one scheduler deployment per model.

    Args:
        config: the application.
        models: its models, with everything decided.
        listener: where replicas report progress and failures.
        request_router: chooses the replicas in place of the ingress, for comparisons.
    """
    handles = [_scheduler_deployment(config, model, listener, request_router or ChosenReplica) for model in models]
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=config.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_UNLIMITED,
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        health_check_period_s=_HEALTH_PERIOD_SECONDS,
    )(Ingress)
    # Several ingresses may need more than what is left to them; then the kernel finds them CPUs.
    cpu_shards = [model.settings.shards_per_node for model in models if model.device == "cpu"]
    alone = max(cpu_shards, default=0) if config.ingress_replicas == 1 else 0
    return ingress.bind(
        [model.card for model in models],
        handles,
        config.router,
        read_classifier(config.router, [model.card.name for model in models]),
        config.max_body_bytes,
        alone,
        chooses_replicas=request_router is None,
    )


def _scheduler_deployment(
    config: ServeConfig,
    model: ServedModel,
    listener: Endpoint | None,
    request_router: type[RequestRouter] | str,
) -> Application:
    scaling = autoscaling_config(model.config, config.router.targets())
    size = {"num_replicas": model.config.replicas} if scaling is None else {"autoscaling_config": scaling}
    bounds = model.config.replica_bounds
    waiting = model.settings.max_num_waiting * (model.config.replicas if bounds is None else bounds[1])
    deployment = serve.deployment(
        name=deployment_name(model.card.name),
        **size,
        ray_actor_options={"num_cpus": SCHEDULER_CPUS},
        placement_group_bundles=replica_bundles(model.config, model.device),
        placement_group_strategy="PACK",
        max_ongoing_requests=_UNLIMITED,
        max_queued_requests=max(waiting, _MIN_QUEUED_REQUESTS),
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        health_check_period_s=_HEALTH_PERIOD_SECONDS,
        request_router_config=RequestRouterConfig(request_router_class=request_router),  # type: ignore[arg-type]
    )(SchedulerReplica)
    return deployment.bind(msgspec.structs.replace(model.settings, listener=listener))


def deployment_name(model: str) -> str:
    """A model's name in Ray's dashboard: characters that Serve or its metrics give a meaning become dashes."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", model)
