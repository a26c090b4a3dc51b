"""Autoscaling in Ray Serve: replicas report predicted queues, and Serve's controller asks `QueueTimePolicy`.

The rules are in `cluster/autoscaling.py`; here they meet Serve. Serve's own delays and factors are switched off, as the
rules say themselves how long and how much. The controller gets this module by value and imports from `cluster/` only,
which loads neither torch nor transformers.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from typing import Any

import msgspec
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from ..cluster.autoscaling import (
    QUEUE_METRIC,
    UTILISATION_METRIC,
    Observation,
    ScalingRules,
    ScalingState,
    decide,
)
from ..cluster.config import ModelConfig
from ..cluster.latency_class import LatencyTargets

logger = logging.getLogger("ray.serve")

REPORT_SECONDS = 1.0
"""Between two reports of a replica to Serve, and between two decisions. Serve asks ten times a second."""
LOOK_BACK_SECONDS = 10.0
"""Serve gives means over this time."""
COMPLAINT_SECONDS = 60.0
"""Between two log entries about a policy that cannot decide."""


class QueueTimePolicy:
    """Decides from predicted queue seconds and utilisation; keeps the number if it does not know or cannot tell."""

    def __init__(self, **rules: Any) -> None:
        """Make the policy with the fields of `ScalingRules`."""
        self._rules = msgspec.convert(rules, ScalingRules)
        self._complained = float("-inf")

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas that there should be, and what Serve hands back with the next question."""
        state = dict(context.policy_state)
        now = time.time() if context.current_time is None else context.current_time
        try:
            return self._decide(context, now, state), state
        except Exception:  # else the whole application would not be looked after any more
            if not 0 <= now - self._complained < COMPLAINT_SECONDS:
                self._complained = now
                logger.exception("no autoscaling decision for %s; it keeps its replicas", context.deployment_name)
            return context.target_num_replicas, dict(context.policy_state)

    def _decide(self, context: AutoscalingContext, now: float, state: dict[str, Any]) -> int:
        """The decision; puts what the next one needs to know into `state`."""
        target = context.target_num_replicas
        if 0 <= now - state.get("decided", float("-inf")) < REPORT_SECONDS:
            return target
        scaling = state.get("scaling", ScalingState())
        metrics = context.aggregated_metrics or {}
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        seen = self._observe(metrics, now=now, target=target, ready=context.current_num_replicas)
        number, state["scaling"] = decide(seen, least, most, self._rules, scaling)
        state["decided"] = now
        if number != target:
            longest = {name: f"{max(waits):.2f} s" for name, waits in seen.waits.items() if waits}
            logger.info(
                "%s: %d replicas instead of %d, as %d report %s of their work and queues of up to %s",
                context.deployment_name,
                number,
                target,
                len(seen.utilisation),
                ", ".join(f"{one:.0%}" for one in seen.utilisation),
                longest,
            )
        return number

    def _observe(
        self, metrics: Mapping[str, Mapping[Any, float]], *, now: float, target: int, ready: int
    ) -> Observation:
        waits = {name: list(metrics.get(QUEUE_METRIC + name, {}).values()) for name in self._rules.targets}
        return Observation(now, target, ready, waits, list(metrics.get(UTILISATION_METRIC, {}).values()))


def autoscaling_config(
    model: ModelConfig, targets: Mapping[str, LatencyTargets], *, settle_seconds: float | None = None
) -> AutoscalingConfig | None:
    """What Serve is told about the number of a model's replicas; None if it is fixed.

    Args:
        model: as configured.
        targets: by latency class (`RouterConfig.targets`).
        settle_seconds: as in `ScalingRules`; None: the default.
    """
    bounds = model.replica_bounds
    if bounds is None:
        return None
    rules: dict[str, Any] = {"targets": {name: target.ttft for name, target in targets.items()}}
    if settle_seconds is not None:
        rules["settle_seconds"] = settle_seconds
    with warnings.catch_warnings():
        # Serve calls the interval deprecated, and has nothing yet in its place for reports of replicas.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=bounds[0],
            initial_replicas=model.replicas,
            max_replicas=bounds[1],
            metrics_interval_s=REPORT_SECONDS,
            look_back_period_s=LOOK_BACK_SECONDS,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            policy=AutoscalingPolicy(policy_function=QueueTimePolicy, policy_kwargs=rules),
        )
