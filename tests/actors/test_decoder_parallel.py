"""Sharded decoders give the whole decoder's logits, for every family and every way to cut."""

import pytest
import torch
from paged_batch import CPU
from shard_threads import assert_equals_one_shard
from tiny_models import FAMILIES, make_tiny_model

from raytroupe.actors.weights import load_weights
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.topology import all_layouts, weight_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_two_by_two_shards_equal_one(family, tmp_path):
    assert_equals_one_shard(make_tiny_model(family, tmp_path), tp=2, pp=2)


@pytest.mark.parametrize("way", ["torch", "native"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "qwen2_moe"])
def test_whichever_way_a_layer_runs(family, way, tmp_path):
    assert_equals_one_shard(make_tiny_model(family, tmp_path), tp=2, pp=2, way=way)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "olmo2", "qwen2_moe"])
def test_kv_heads_are_replicated_where_shards_outnumber_them(family, tmp_path):
    folder = make_tiny_model(family, tmp_path)
    assert_equals_one_shard(folder, tp=4, pp=1)


@pytest.mark.parametrize("pp", [3, 4])
def test_layers_that_do_not_divide_evenly(pp, tmp_path):
    assert_equals_one_shard(make_tiny_model("llama3", tmp_path), tp=1, pp=pp)


@pytest.mark.parametrize("family", ["llama", "llama3", "gemma2", "qwen2_moe", "phi3"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 1)])
def test_the_planner_knows_how_many_bytes_a_shard_loads(family, tp, pp, tmp_path):
    folder = make_tiny_model(family, tmp_path)
    spec = load_spec(folder)
    for layout in all_layouts(tp, pp):
        totals: list[int] = []
        load_weights(folder, spec, layout, torch.float32, CPU, lambda _, total, to=totals: to.append(total))
        norms_and_biases = totals[-1] - weight_bytes(spec, layout, 4)
        assert 0 <= norms_and_biases < 0.08 * totals[-1]
