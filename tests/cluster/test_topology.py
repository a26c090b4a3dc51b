"""Every layer, head and vocabulary row belongs to a shard, and what does not divide is refused with its numbers."""

import dataclasses
import json

import msgspec
import pytest

from raytroupe.cluster.errors import ConfigError
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.topology import ShardLayout, all_layouts, check_topology, kv_bytes_per_block, weight_bytes


@pytest.fixture
def spec(tmp_path):
    config = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "hidden_size": 96,
        "intermediate_size": 240,
        "num_hidden_layers": 7,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 131,
        "num_experts": 5,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 96,
        "decoder_sparse_step": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load_spec(tmp_path)


@pytest.mark.parametrize("pp", range(1, 8))
def test_stages_cover_the_layers_once_and_evenly(spec, pp):
    stages = [layout.layers(spec) for layout in all_layouts(1, pp)]
    assert [layer for stage in stages for layer in stage] == list(range(7))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1
    assert len(stages[-1]) == min(map(len, stages))


@pytest.mark.parametrize("tp", [1, 2, 4, 12])
def test_heads_are_cut_or_replicated(spec, tp):
    for layout in all_layouts(tp, 1):
        assert layout.num_heads(spec) == 12 // tp
        first_query = layout.tp_rank * layout.num_heads(spec)
        group = 12 // 4
        needed = {head // group for head in range(first_query, first_query + layout.num_heads(spec))}
        held = range(layout.first_kv_head(spec), layout.first_kv_head(spec) + layout.num_kv_heads(spec))
        assert needed == set(held)


@pytest.mark.parametrize("tp", [1, 2, 3, 5, 64])
def test_vocabulary_shares_cover_every_token_once(spec, tp):
    layouts = all_layouts(tp, 1)
    assert [token for layout in layouts for token in layout.vocab(spec)] == list(range(131))
    assert all(len(layout.vocab(spec)) <= layout.padded_vocab_share(spec) for layout in layouts)


def test_ranks_go_through_stages():
    layouts = all_layouts(2, 3)
    assert [layout.rank for layout in layouts] == list(range(6))
    assert [layout.is_output for layout in layouts] == [False] * 4 + [True, False]
    assert [layout.first_stage for layout in layouts] == [True] * 2 + [False] * 4
    assert dataclasses.asdict(layouts[3]) == {"tp_rank": 1, "tp_size": 2, "pp_rank": 1, "pp_size": 3}


@pytest.mark.parametrize(
    ("change", "tp", "pp", "words"),
    [
        ({}, 3, 1, ["tensor_parallel_size = 3", "4 KV heads"]),
        ({}, 8, 1, ["tensor_parallel_size = 8", "attention heads (12)"]),
        ({"intermediate_size": 241}, 2, 1, ["tensor_parallel_size = 2", "intermediate size (241)"]),
        ({}, 1, 8, ["pipeline_parallel_size = 8", "7 layers"]),
    ],
)
def test_what_does_not_divide_is_refused_with_both_numbers(spec, change, tp, pp, words):
    with pytest.raises(ConfigError) as caught:
        check_topology(msgspec.structs.replace(spec, **change), tp, pp)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("field", ["intermediate_size", "shared_intermediate_size"])
def test_expert_widths_must_divide(spec, field):
    moe = msgspec.structs.replace(spec.moe, **{field: 49})
    with pytest.raises(ConfigError, match=r"expert intermediate size \(49\)"):
        check_topology(msgspec.structs.replace(spec, moe=moe), 2, 1)


def test_block_bytes_count_this_shards_layers_and_heads(spec):
    assert kv_bytes_per_block(spec, ShardLayout(), 16, 2) == 7 * 16 * 2 * 4 * 8 * 2
    assert kv_bytes_per_block(spec, ShardLayout(tp_size=2, pp_size=2), 16, 2) == 4 * 16 * 2 * 2 * 8 * 2
    assert kv_bytes_per_block(spec, ShardLayout(tp_size=12), 16, 4) == 7 * 16 * 2 * 1 * 8 * 4


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_8_bits_have_a_scale_for_every_head_of_a_token(spec, kv_cache_dtype):
    for computed in (2, 4):
        assert kv_bytes_per_block(spec, ShardLayout(), 16, computed, kv_cache_dtype) == 7 * 16 * 2 * 4 * (8 + 4)


def test_weight_bytes_add_up_to_the_model(spec):
    whole = weight_bytes(spec, ShardLayout(), 2)
    padding = (132 - 131) * 96 * 2 * 2
    replicated_routers = 3 * 5 * 96 * 2
    parts = sum(weight_bytes(spec, layout, 2) for layout in all_layouts(2, 2))
    assert parts == whole + padding + replicated_routers
