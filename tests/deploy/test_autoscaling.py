"""The policy as Serve's controller sees it, with contexts made up."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from raytroupe.cluster.config import ModelConfig, load_config
from raytroupe.cluster.errors import ConfigError
from raytroupe.cluster.latency_class import DEFAULT_TARGETS
from raytroupe.deploy.autoscaling import QueueTimePolicy, autoscaling_config


def context(now: float = 0.0, state: dict[str, Any] | None = None, **fields: Any) -> Any:
    usual = {
        "current_num_replicas": 2,
        "target_num_replicas": 2,
        "capacity_adjusted_min_replicas": 1,
        "capacity_adjusted_max_replicas": 8,
        "aggregated_metrics": {},
        "deployment_name": "m",
    }
    return SimpleNamespace(current_time=now, policy_state=state or {}, **{**usual, **fields})


def report(**of_replicas: list[float]) -> dict[str, dict[str, float]]:
    return {name: {f"r{i}": value for i, value in enumerate(values)} for name, values in of_replicas.items()}


def policy() -> QueueTimePolicy:
    config = autoscaling_config(ModelConfig(model="m", max_replicas=8), DEFAULT_TARGETS)
    assert config is not None
    return config.policy.get_policy()(**config.policy.policy_kwargs)  # as Serve does it


WAITING = report(queue_seconds_interactive=[0.7, 0.7], utilisation=[0.7, 0.7])
IDLE = report(queue_seconds_interactive=[0.0, 0.0], utilisation=[0.0, 0.0])


def test_queues_that_replicas_report_bring_more_of_them() -> None:
    assert policy()(context(aggregated_metrics=WAITING))[0] == 3


def test_the_number_falls_after_a_minute_of_little_work() -> None:
    decider, state, numbers = policy(), {}, []
    for second in range(62):
        number, state = decider(context(float(second), state, aggregated_metrics=IDLE))
        numbers.append(number)
    assert numbers == [2] * 60 + [1] * 2


def test_nothing_is_asked_of_metrics_more_often_than_they_come() -> None:
    decider = policy()
    _, state = decider(context(100.0, aggregated_metrics=IDLE))
    number, same = decider(context(100.5, state, aggregated_metrics=WAITING))
    assert (number, same) == (2, state)
    assert decider(context(101.0, state, aggregated_metrics=WAITING))[0] == 3
    assert decider(context(50.0, state, aggregated_metrics=WAITING))[0] == 3  # the clock was set back


@pytest.mark.parametrize(
    "metrics",
    [None, {}, report(other=[9.0]), report(queue_seconds_batch=[9.0, 9.0])],
    ids=["none", "{}", "other", "low"],
)
def test_unknown_metrics_keep_the_number(metrics: Any) -> None:
    decider, state = policy(), {}
    for second in range(90):
        number, state = decider(context(float(second), state, aggregated_metrics=metrics))
        assert number == 2


def test_a_fault_keeps_the_number_and_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    decider, broken = policy(), {"utilisation": {"r0": "much"}}
    with caplog.at_level(logging.ERROR, "ray.serve"):
        for tenth in range(700):
            state = {"mine": 1}
            assert decider(context(tenth / 10, state, aggregated_metrics=broken)) == (2, state)
    assert [record.getMessage() for record in caplog.records] == [
        "no autoscaling decision for m; it keeps its replicas"
    ] * 2
    assert decider(context(80.0, aggregated_metrics=WAITING))[0] == 3


def test_the_policy_loads_little() -> None:
    """Serve's controller unpickles it; torch there would cost memory and seconds."""
    config = autoscaling_config(ModelConfig(model="m", max_replicas=8), DEFAULT_TARGETS)
    assert config is not None
    pickled = config.policy.get_serialized_policy_def()
    assert pickled is not None
    assert pickle.loads(pickled).__name__ == "QueueTimePolicy"
    program = (
        "import pickle, sys, ray.serve; ours = set(sys.modules)\n"
        f"pickle.loads({pickled!r})\nprint(*set(sys.modules) - ours)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    loaded = output.stdout.split()
    assert "raytroupe.cluster.autoscaling" in loaded
    assert not {"torch", "transformers", "raytroupe.deploy.autoscaling"} & set(loaded)


def test_a_fixed_number_is_not_scaled() -> None:
    assert autoscaling_config(ModelConfig(model="m", replicas=3), DEFAULT_TARGETS) is None


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({"max_replicas": 4}, (1, 1, 4)),
        ({"replicas": 2, "max_replicas": 4}, (2, 2, 4)),
        ({"replicas": 3, "min_replicas": 1}, (1, 3, 3)),
        ({"min_replicas": 2, "max_replicas": 4}, (2, 2, 4)),
        ({"replicas": 3, "min_replicas": 2, "max_replicas": 4}, (2, 3, 4)),
    ],
)
def test_what_is_not_given_follows_from_the_rest(given: dict[str, int], bounds: tuple[int, int, int]) -> None:
    config = autoscaling_config(ModelConfig(model="m", **given), DEFAULT_TARGETS)
    assert config is not None
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == bounds


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min_replicas": 4, "max_replicas": 2}, "min_replicas (4) must be at most max_replicas (2)"),
        (
            {"replicas": 5, "max_replicas": 2},
            "replicas (5), with which the model starts, must be at most max_replicas (2)",
        ),
        ({"replicas": 5, "min_replicas": 1, "max_replicas": 2}, "replicas (5), with which the model starts, must be "),
        ({"replicas": 1, "min_replicas": 2, "max_replicas": 3}, "must be at least min_replicas (2); leave replicas"),
        ({"min_replicas": 0}, "min_replicas = 0"),
    ],
)
def test_bounds_that_contradict_each_other_are_refused(given: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config({"models": [{"model": "m", **given}]})
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
