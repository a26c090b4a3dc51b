"""What a configuration is refused for, and with which words."""

from __future__ import annotations

from typing import Any

import pytest

from raytroupe.cluster.config import load_config
from raytroupe.cluster.errors import ConfigError


def refusal(model: dict[str, Any] | None = None, **application: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config({"models": [{"model": "a", **(model or {})}], **application})
    return str(refused.value)


def test_defaults_are_accepted() -> None:
    config = load_config({"models": [{"model": "a/b"}]})
    assert (config.models[0].name, config.port, config.dashboard_port) == ("b", 8000, 8265)
    assert config.models[0].enable_prefix_caching is True


@pytest.mark.parametrize(
    "field", ["max_model_len", "replicas", "block_size", "kv_cache_memory", "num_threads", "gpu_memory_utilization"]
)
@pytest.mark.parametrize("value", [True, False])
def test_booleans_are_not_taken_for_numbers(field: str, value: bool) -> None:
    assert refusal({field: value}) == (
        f"models.0.{field} = {value}: this field is not a switch; true and false mean nothing here"
    )


def test_booleans_are_not_taken_for_ports() -> None:
    assert refusal(port=True).startswith("port = True: this field is not a switch")
    assert refusal(max_body_bytes=True).startswith("max_body_bytes = True: this field is not a switch")


def test_switches_take_booleans() -> None:
    config = load_config({"models": [{"model": "a", "enable_prefix_caching": False}]})
    assert config.models[0].enable_prefix_caching is False


def test_api_and_dashboard_need_a_port_each() -> None:
    assert "port and dashboard_port are both 8265" in refusal(port=8265)
    assert "port and dashboard_port are both 9000" in refusal(port=9000, dashboard_port=9000)


def test_every_fault_is_a_line_that_names_the_field_and_the_value() -> None:
    lines = refusal({"max_model_len": 1, "block_size": 24, "typo": 3}, port=0).splitlines()
    assert len(lines) == 4
    for words in ("models.0.max_model_len = 1", "models.0.block_size = 24", "models.0.typo: unknown field", "port = 0"):
        assert sum(line.startswith(words) for line in lines) == 1


def test_budget_must_reach_every_sequence() -> None:
    message = refusal({"max_num_seqs": 64, "max_num_batched_tokens": 32})
    assert "max_num_batched_tokens (32) must be at least max_num_seqs (64)" in message


def test_a_name_stands_for_one_model() -> None:
    with pytest.raises(ConfigError, match="models share the name 'b'"):
        load_config({"models": [{"model": "a/b"}, {"model": "c/b"}]})


@pytest.mark.parametrize(("text", "size"), [("512MiB", 512 * 2**20), ("1.5g", 1_500_000_000), (7, 7)])
def test_memory_sizes(text: object, size: int) -> None:
    assert load_config({"models": [{"model": "a", "kv_cache_memory": text}]}).models[0].kv_cache_memory == size


@pytest.mark.parametrize("text", ["much", "-1GiB", 0])
def test_other_memory_sizes_are_refused(text: object) -> None:
    assert refusal({"kv_cache_memory": text}).startswith(f"models.0.kv_cache_memory = {text!r}: ")


@pytest.mark.parametrize("value", [0, -0.5, 1.01, float("nan")])
def test_a_gpu_is_used_in_part_or_as_a_whole(value: float) -> None:
    assert refusal({"gpu_memory_utilization": value}).startswith(f"models.0.gpu_memory_utilization = {value!r}: ")
    assert load_config({"models": [{"model": "a", "gpu_memory_utilization": 1}]}).models[0].gpu_memory_utilization == 1
