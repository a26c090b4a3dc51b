"""From `quantization_config` to the scheme of every module: what each method writes, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raytroupe.cluster.errors import CheckpointError, UnsupportedModel
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.quantisation import Layout, Quantisation, Scheme
from raytroupe.cluster.quantisation_config import parse_quantisation
from raytroupe.cluster.topology import ShardLayout, all_layouts, quantised_layer_bytes, weight_bytes

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
Q_PROJ = "model.layers.3.self_attn.q_proj"


def compressed(*, form: str = "pack-quantized", group: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, **(group or {})}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, **fields}


def test_gptq():
    quantisation = parse_quantisation(GPTQ)
    expected = Scheme(layout=Layout.GPTQ, bits=4, group_size=128, symmetric=False, act_order=True)
    assert quantisation.scheme(Q_PROJ) == expected
    assert quantisation.scheme("lm_head") is None
    assert quantisation.label == "int4 g128"
    assert parse_quantisation({**GPTQ, "lm_head": True}).scheme("lm_head") == expected
    assert parse_quantisation({**GPTQ, "checkpoint_format": "gptq_v2"}).schemes[0].layout is Layout.GPTQ_V2
    per_row = parse_quantisation({**GPTQ, "group_size": -1})
    assert per_row.schemes[0].group_size is None
    assert per_row.label == "int4"


def test_gptq_with_exceptions():
    dynamic = {
        "-:.*layers\\.3\\..*_proj": {},
        "+:.*down_proj": {"bits": 8, "group_size": 32},
        ".*up_proj": {"desc_act": False},
    }
    quantisation = parse_quantisation({**GPTQ, "dynamic": dynamic})
    assert quantisation.scheme(Q_PROJ) is None
    down, up = (quantisation.scheme(f"model.layers.4.mlp.{name}_proj") for name in ("down", "up"))
    assert down is not None
    assert (down.bits, down.group_size) == (8, 32)
    assert up is not None
    assert (up.bits, up.act_order) == (4, False)
    chosen = parse_quantisation({**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj"], "mlp.down_proj"]})
    assert chosen.scheme(Q_PROJ) is not None
    assert chosen.scheme("model.layers.3.mlp.down_proj") is not None
    assert chosen.scheme("model.layers.3.self_attn.k_proj") is None


def test_awq():
    quantisation = parse_quantisation({**AWQ, "modules_to_not_convert": ["mlp.gate", "layers.3.self_attn"]})
    assert quantisation.schemes == (Scheme(layout=Layout.AWQ, bits=4, group_size=64, symmetric=False),)
    assert quantisation.scheme(Q_PROJ) is None
    assert quantisation.scheme("lm_head") is None
    assert quantisation.scheme("model.layers.4.self_attn.q_proj") is not None


def test_fp8_of_transformers():
    left_out = ["model.layers.3", "o_proj"]
    fields = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": left_out}
    quantisation = parse_quantisation(fields)
    assert quantisation.scheme(Q_PROJ) is None
    assert quantisation.scheme("model.layers.30.self_attn.o_proj") is None
    assert quantisation.scheme("model.layers.30.self_attn.q_proj") == Scheme(
        layout=Layout.PLAIN, bits=8, is_float=True, group_size=128, rows_per_scale=128, activations="fp8"
    )
    assert quantisation.label == "fp8 128x128 with fp8 activations"
    assert parse_quantisation({"quant_method": "fp8"}).schemes[0].rows_per_scale is None


def test_compressed_tensors_targets():
    eight = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "strategy": "channel"}}
    one = {"targets": [Q_PROJ], "weights": {"num_bits": 3, "strategy": "channel"}}
    groups = {"a": {"targets": ["Linear"], "weights": WEIGHTS}, "b": eight, "c": one}
    quantisation = parse_quantisation(compressed(config_groups=groups, ignore=["re:.*lm_head", "model.layers.0.x"]))

    def bits(module: str) -> int | None:
        scheme = quantisation.scheme(module)
        return None if scheme is None else scheme.bits

    assert bits(Q_PROJ) == 3  # a name before an expression before a class
    assert bits("model.layers.3.mlp.down_proj") == 8
    assert bits("model.layers.3.mlp.up_proj") == 4
    assert bits("model.layers.0.x") is None
    assert bits("lm_head") is None
    assert bits("model.layers.0.xy") == 4
    assert parse_quantisation(compressed()).scheme("lm_head") is not None  # a linear layer like others


@pytest.mark.parametrize(
    ("weights", "group_size", "rows_per_scale"),
    [
        ({"strategy": "group", "group_size": 32}, 32, 1),
        ({"strategy": "channel"}, None, 1),
        ({"strategy": None, "group_size": -1}, None, 1),
        ({"strategy": None, "group_size": 64}, 64, 1),
        ({"strategy": "tensor"}, None, None),
        ({"strategy": "block", "block_structure": [64, 128]}, 128, 64),
    ],
)
def test_who_shares_a_scale(weights, group_size, rows_per_scale):
    scheme = parse_quantisation(compressed(group={"weights": {"num_bits": 8, **weights}})).schemes[0]
    assert (scheme.group_size, scheme.rows_per_scale) == (group_size, rows_per_scale)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; known: gptq, awq"),
        ({"bits": 4}, "quant_method 'missing'"),
        ({**GPTQ, "bits": 5}, "GPTQ with bits = 5 is not supported; known: 2, 3, 4, 8"),
        ({**GPTQ, "dynamic": {".*": {"bits": 6}}}, "GPTQ with bits = 6"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported; known: gptq, gptq_v2"),
        ({**GPTQ, "is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({**AWQ, "bits": 8}, "AWQ with bits = 8 is not supported; known: 4"),
        ({**AWQ, "version": "GEMV"}, "AWQ version 'gemv' is not supported; known: gemm"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        (compressed(form="marlin-24"), "format 'marlin-24' is not supported; known: pack-quantized"),
        (compressed(form="mixed-precision"), "format 'mixed-precision'"),
        (compressed(group={"weights": {**WEIGHTS, "num_bits": 9}}), "int weights of 9 bits"),
        (compressed(group={"weights": {"num_bits": 4, "type": "float"}}), "float weights of 4 bits"),
        (compressed(group={"weights": {**WEIGHTS, "strategy": "tensor_group"}}), "weight strategy 'tensor_group'"),
        (compressed(group={"weights": None}), "config group 'group_0' quantises something else"),
        (compressed(group={"input_activations": {"num_bits": 4}}), "int activations of 4 bits"),
        (compressed(group={"targets": ["Embedding"]}), "target 'Embedding'"),
        (compressed(transform_config={"config_groups": {"u": {}}}), "transform_config is not supported"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not supported"),
    ],
)
def test_what_is_not_known_is_refused_by_name(fields, named):
    with pytest.raises(UnsupportedModel) as caught:
        parse_quantisation(fields)
    assert named in str(caught.value)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "eos_token_id": 2,
}


def spec_of(tmp_path, **changes):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return load_spec(tmp_path)


def quantisation_of(tmp_path, **changes) -> Quantisation | None:
    return spec_of(tmp_path, **changes).quantisation


def test_where_a_config_may_be(tmp_path):
    assert quantisation_of(tmp_path) is None
    here = quantisation_of(tmp_path, quantization_config=GPTQ)
    assert here == quantisation_of(tmp_path, text_config={"quantization_config": GPTQ})
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128, "desc_act": False}))
    assert quantisation_of(tmp_path).label == "int4 g128"
    assert quantisation_of(tmp_path, quantization_config=GPTQ) == here
    (tmp_path / "quantize_config.json").unlink()
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(old))
    assert quantisation_of(tmp_path) == parse_quantisation(AWQ)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({**GPTQ, "group_size": "big"}, "group_size = 'big'; a positive integer is needed"),
        ({**GPTQ, "dynamic": {"-:(": {}}}, "quantization_config is not understood"),
        (
            {"quant_method": "fp8", "weight_block_size": 128},
            "weight_block_size = 128; two positive integers are needed",
        ),
        ({"quant_method": "fp8", "weight_block_size": [0, 32]}, "weight_block_size = 0; a positive integer is needed"),
        (
            {"quant_method": "fp8", "weight_block_size": [32, 1.5]},
            "weight_block_size = 1.5; a positive integer is needed",
        ),
        (
            {**AWQ, "modules_to_not_convert": "lm_head"},
            "modules_to_not_convert = 'lm_head'; a list of strings is needed",
        ),
        (compressed(ignore="lm_head"), "ignore = 'lm_head'; a list of strings is needed"),
        (compressed(config_groups={}), "config_groups is missing"),
        (compressed(group={"weights": {"num_bits": 8, "strategy": "block"}}), "block_structure = None"),
    ],
)
def test_impossible_values_are_refused_with_the_file(fields, named, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        quantisation_of(tmp_path, quantization_config=fields)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
    assert named in str(caught.value)


def test_a_stack_with_a_part_of_another_kind_is_kept_unquantised(tmp_path):
    spec = spec_of(tmp_path, quantization_config=compressed(ignore=["lm_head", "re:.*v_proj"]))
    whole = spec_of(tmp_path, quantization_config=compressed(ignore=["lm_head"]))
    heads = 2 * spec.num_kv_heads + spec.num_heads
    stacks = spec.num_layers * heads * spec.head_dim * spec.hidden_size
    scheme = whole.quantisation.schemes[0]
    per_weight = scheme.nbytes(1, spec.hidden_size) / spec.hidden_size
    more = weight_bytes(spec, ShardLayout(), 2) - weight_bytes(whole, ShardLayout(), 2)
    assert more == pytest.approx(stacks * (2 - per_weight))


def test_floats_of_8_bits_count_as_wide_where_they_are_expanded(tmp_path):
    spec = spec_of(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    dense = spec_of(tmp_path)
    assert weight_bytes(spec, ShardLayout(), 2, expands_floats=True) == weight_bytes(dense, ShardLayout(), 2)
    assert weight_bytes(spec, ShardLayout(), 2) < weight_bytes(dense, ShardLayout(), 2)


def test_quantised_bytes_add_up(tmp_path):
    dense = spec_of(tmp_path)
    spec = spec_of(tmp_path, quantization_config=compressed(ignore=["lm_head", "re:.*layers.0.*"]))
    now, before = quantised_layer_bytes(spec, ShardLayout())
    assert now / before == (4 + 16 / 128) / 16
    assert weight_bytes(dense, ShardLayout(), 2) - weight_bytes(spec, ShardLayout(), 2) == before - now
    assert before == 2 * (4 * 256 * 256 + 3 * 256 * 512) * 2
    parts = [quantised_layer_bytes(spec, layout) for layout in all_layouts(2, 2)]
    assert tuple(map(sum, zip(*parts, strict=True))) == (now, before)
    assert quantised_layer_bytes(dense, ShardLayout()) == (0, 0)
