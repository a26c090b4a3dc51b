"""What an application asks of the cluster, and when it is refused."""

from __future__ import annotations

import pytest

from raytroupe.actors.placement import (
    Capacity,
    check_capacity,
    most_replicas,
    replica_bundles,
    resolve_device,
    scaling_notices,
    shards_per_node,
)
from raytroupe.cluster.config import ModelConfig
from raytroupe.cluster.errors import ConfigError


def model(name: str = "m", tp: int = 1, pp: int = 1, replicas: int = 1, **fields: object) -> ModelConfig:
    return ModelConfig(
        model=f"models/{name}", tensor_parallel_size=tp, pipeline_parallel_size=pp, replicas=replicas, **fields
    )


def test_a_replica_is_a_scheduler_and_one_bundle_per_shard() -> None:
    assert replica_bundles(model(tp=2, pp=3), "cuda") == [{"CPU": 0.05}] + [{"GPU": 1.0, "CPU": 0.05}] * 6
    assert replica_bundles(model(), "cpu") == [{"CPU": 0.05}, {"CPU": 0.2}]


@pytest.mark.parametrize(
    ("asked", "gpus", "device"),
    [("auto", 0, "cpu"), ("auto", 4, "cuda"), ("cpu", 4, "cpu"), ("cuda", 0, "cuda")],
)
def test_auto_takes_gpus_where_there_are_any(asked: str, gpus: int, device: str) -> None:
    assert resolve_device(model(device=asked), Capacity(8, gpus)) == device


def test_two_cores_hold_tensor_2_pipeline_2_beside_the_demo_models() -> None:
    models = [model("large"), model("small"), model("divided", tp=2, pp=2), model("twice", replicas=2)]
    check_capacity(models, ["cpu"] * 4, Capacity(2, 0))


def test_too_many_cpu_shards_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^wide \(tensor 8 × pipeline 1 × replicas 2 = 16\) need 16 cpu shards, and the cluster has room for 9 "
        r"\(2 logical CPUs on 1 node\(s\)\); lower",
    ):
        check_capacity([model("wide", tp=8, replicas=2)], ["cpu"], Capacity(2, 0))


def test_gpu_shards_of_all_models_count_together() -> None:
    models = [model("a", tp=4), model("b", pp=2, replicas=3)]
    check_capacity(models, ["cuda", "cuda"], Capacity(16, 10))
    with pytest.raises(ConfigError, match=r"a \(.*= 4\) and b \(.*= 6\) need 10 cuda shards.* has room for 9 \(9 "):
        check_capacity(models, ["cuda", "cuda"], Capacity(16, 9, nodes=2))


def test_asking_for_cuda_without_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"need 1 cuda shards, and the cluster has room for 0"):
        check_capacity([model()], ["cuda"], Capacity(64, 0))


def test_room_is_exactly_what_is_accepted() -> None:
    check_capacity([model(replicas=8)], ["cpu"], Capacity(2, 0))
    with pytest.raises(ConfigError, match="need 9 cpu shards, and the cluster has room for 7"):
        check_capacity([model(replicas=9)], ["cpu"], Capacity(2, 0))


def test_shards_per_node_counts_only_the_device() -> None:
    models = [model("a", tp=4), model("b", pp=2, replicas=3)]
    assert shards_per_node(models, ["cuda", "cpu"], "cpu", Capacity(8, 4, nodes=2)) == 3
    assert shards_per_node(models, ["cuda", "cpu"], "cuda", Capacity(8, 4, nodes=3)) == 2


def test_a_model_that_grows_leaves_room_for_what_all_start_with() -> None:
    models = [model("grows", tp=2, max_replicas=8), model("stays", replicas=3)]
    assert most_replicas(models, ["cuda", "cuda"], Capacity(64, 10)) == [3, 3]
    assert most_replicas(models, ["cuda", "cuda"], Capacity(64, 64)) == [8, 3]
    assert scaling_notices(models, ["cuda", "cuda"], Capacity(64, 10)) == [
        "grows: the cluster has room for 3 of max_replicas = 8; further replicas wait for nodes"
    ]
    assert scaling_notices(models, ["cuda", "cuda"], Capacity(64, 64)) == []


def test_an_application_starts_if_its_first_replicas_fit() -> None:
    check_capacity([model(max_replicas=1000)], ["cpu"], Capacity(2, 0))


def test_shards_share_their_node_with_those_that_may_come() -> None:
    growing = [model("a", max_replicas=4), model("b")]
    assert shards_per_node(growing, ["cpu", "cpu"], "cpu", Capacity(2, 0)) == 5
    both = [model("a", max_replicas=1000), model("b", max_replicas=1000)]
    assert shards_per_node(both, ["cpu", "cpu"], "cpu", Capacity(2, 0)) == 9
