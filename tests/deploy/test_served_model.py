"""What is decided for a user who decides nothing."""

from __future__ import annotations

import pytest

from raytroupe.actors.placement import Capacity
from raytroupe.cluster.config import ModelConfig
from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.model_folder import DEMO_MODELS
from raytroupe.deploy.served_model import resolve_models

LARGE, SMALL = DEMO_MODELS


def test_defaults_of_the_embedded_models() -> None:
    large, _ = resolve_models([ModelConfig(model=LARGE), ModelConfig(model=SMALL)], Capacity(cpus=8, gpus=0))
    assert large.card.name == "demo-large"
    assert large.card.max_model_len == large.settings.max_model_len == 2048
    assert large.card.vocab_size == 1280
    assert large.card.eos_token_ids
    assert large.settings.device == "cpu"
    assert large.settings.shards_per_node == 2


def test_shards_of_a_node_are_counted_over_all_models() -> None:
    models = [
        ModelConfig(model=LARGE, tensor_parallel_size=2, pipeline_parallel_size=2),
        ModelConfig(model=SMALL, replicas=2, num_threads=7),
    ]
    large, small = resolve_models(models, Capacity(cpus=16, gpus=0))
    assert large.settings.shards_per_node == small.settings.shards_per_node == 6
    assert large.settings.num_threads is None, "a shard decides on its node"
    assert small.settings.num_threads == 7


def test_kv_cache_that_cannot_hold_one_request_is_refused_with_the_numbers() -> None:
    model = ModelConfig(model=LARGE, kv_cache_memory="2MiB", dtype="float32")
    with pytest.raises(ConfigError, match=r"2 MiB per shard.* 2048 needs 12\.1 MiB; raise --kv-cache-memory"):
        resolve_models([model], Capacity(cpus=2, gpus=0))


def test_gpus_are_taken_where_there_are_any() -> None:
    (large,) = resolve_models([ModelConfig(model=LARGE, tensor_parallel_size=2)], Capacity(cpus=8, gpus=2))
    assert large.device == large.settings.device == "cuda"
