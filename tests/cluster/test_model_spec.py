"""From config.json to ModelSpec: both spellings, the values that configs leave out, and what is refused by name."""

import json

import pytest

from raytroupe.cluster.errors import CheckpointError, UnsupportedModel
from raytroupe.cluster.families import FAMILIES, NormPlacement, QKNorm
from raytroupe.cluster.model_spec import load_generation_defaults, load_spec

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "eos_token_id": 2,
}


def spec_of(tmp_path, **changes):
    config = {**LLAMA, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load_spec(tmp_path)


def windows(spec):
    return [layer.window for layer in spec.layers]


def test_values_that_old_configs_leave_out(tmp_path):
    spec = spec_of(tmp_path)
    assert (spec.num_kv_heads, spec.head_dim, spec.max_position_embeddings) == (4, 16, 2048)
    assert (spec.dtype, spec.tie_word_embeddings, spec.activation) == ("float32", False, "silu")
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias) == (False, False, False)
    assert spec.attention_scale == 16**-0.5
    assert spec.ropes[0].theta == 10000.0
    assert spec.eos_token_ids == (2,)


def test_null_means_left_out(tmp_path):
    assert spec_of(tmp_path, head_dim=None, num_key_value_heads=None, rope_scaling=None) == spec_of(tmp_path)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UnsupportedModel) as caught:
        spec_of(tmp_path, architectures=["MambaForCausalLM"])
    message = str(caught.value)
    assert "'MambaForCausalLM'" in message
    assert all(name in message for name in FAMILIES)
    with pytest.raises(UnsupportedModel, match=r"none \(model_type 'bert'\)"):
        spec_of(tmp_path, architectures=None, model_type="bert")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope type 'spiral'"),
        ({"rope_scaling": {"type": "mrope"}}, "rope type 'mrope'"),
        ({"hidden_act": "relu2"}, "activation 'relu2'"),
        ({"quantization_config": {"quant_method": "eetq"}}, "quant_method 'eetq'"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "layer_types": ["linear_attention"]},
            r"layer_types\[0\] = 'linear_attention'",
        ),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_unknown_options_are_refused_by_name(changes, named, tmp_path):
    with pytest.raises(UnsupportedModel, match=named):
        spec_of(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": None}, "hidden_size = None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"vocab_size": "32000"}, "vocab_size = '32000'"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor = None"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "needs 8 numbers in 'short_factor'"),
        ({"rope_scaling": [1]}, r"rope_scaling = \[1\]; an object is needed"),
        ({"rope_theta": "big"}, "rope_theta = 'big'"),
        ({"head_dim": 7}, "7 rotary dimensions"),
        ({"eos_token_id": "</s>"}, "token ids are integers"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "num_experts is missing"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM'; a list is needed"),
        ({"text_config": 3}, "text_config = 3"),
        ({"architectures": ["GraniteForCausalLM"], "logits_scaling": 0}, "does not describe a GraniteForCausalLM"),
    ],
)
def test_impossible_values_are_refused_by_name(changes, named, tmp_path):
    with pytest.raises(CheckpointError, match=named):
        spec_of(tmp_path, **changes)


def test_rope_parameters_in_both_spellings(tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = spec_of(tmp_path, rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **scaling})
    new = spec_of(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling})
    assert old == new
    assert old.ropes[0].rope_type == "llama3"
    assert old.ropes[0].theta == 500000.0


def test_su_and_early_phi3_yarn_mean_longrope(tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for name in ("su", "yarn", "longrope"):
        spec = spec_of(
            tmp_path,
            architectures=["Phi3ForCausalLM"],
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling={"type": name, **factors},
        )
        assert spec.ropes[0].rope_type == "longrope"
        assert spec.ropes[0].original_max_position == 4096


def test_windows_of_each_pattern(tmp_path):
    def of(name, **changes):
        return windows(spec_of(tmp_path, architectures=[name], num_hidden_layers=6, sliding_window=32, **changes))

    assert of("LlamaForCausalLM") == [None] * 6
    assert of("MistralForCausalLM") == [32] * 6
    assert of("Qwen2ForCausalLM") == [None] * 6
    assert of("Qwen2ForCausalLM", use_sliding_window=True, max_window_layers=4) == [None] * 4 + [32] * 2
    assert of("Gemma2ForCausalLM") == [32, None] * 3
    assert of("Gemma3ForCausalLM") == [32] * 5 + [None]
    types = ["full_attention", "sliding_attention"] * 3
    assert of("Gemma3ForCausalLM", layer_types=types) == [None, 32] * 3
    moe = {"num_experts": 4, "use_sliding_window": True, "max_window_layers": 4}
    assert of("Qwen2MoeForCausalLM", **moe) == [32, None, 32, None, None, None]
    assert of("Qwen3MoeForCausalLM", **moe) == [32] * 6
    assert windows(spec_of(tmp_path, architectures=["MistralForCausalLM"], sliding_window=None)) == [None] * 3


def test_gemma3_rotates_sliding_layers_with_their_own_base(tmp_path):
    changes = {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 6, "rope_theta": 1e6}
    spec = spec_of(tmp_path, **changes, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert [layer.rope for layer in spec.layers] == [1, 1, 1, 1, 1, 0]
    assert [(rope.rope_type, rope.theta) for rope in spec.ropes] == [("linear", 1e6), ("default", 1e4)]


def test_the_published_gemma3_config_is_mostly_defaults(tmp_path):
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 106]}))
    spec = load_spec(tmp_path)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262_208)
    assert (spec.norm_placement, spec.qk_norm, spec.norm_offset) == (NormPlacement.SANDWICH, QKNorm.HEAD, 1.0)
    assert (spec.dtype, spec.tie_word_embeddings, spec.eos_token_ids) == ("bfloat16", True, (1, 106))
    assert spec.attention_scale == 256**-0.5
    assert spec.ropes[0].theta == 1e6
    assert spec.ropes[0].factor == 8.0


def test_sparse_layers_of_a_mixture(tmp_path):
    changes = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 6, "num_experts": 4}
    spec = spec_of(tmp_path, **changes, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [layer.sparse for layer in spec.layers] == [False, True, False, False, False, True]
    assert spec.moe is not None
    assert (spec.moe.num_experts, spec.moe.experts_per_token, spec.moe.normalize_weights) == (4, 8, False)


def test_generation_defaults_and_end_tokens(tmp_path):
    spec_of(tmp_path)
    assert load_generation_defaults(tmp_path) == {}
    generation = {"eos_token_id": [5, 6], "temperature": 0.6, "top_p": None, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_generation_defaults(tmp_path) == {"eos_token_id": (5, 6), "temperature": 0.6}
    assert load_spec(tmp_path).eos_token_ids == (5, 6)
    for wrong in ({"top_p": "0.9"}, {"temperature": True}, {"eos_token_id": "</s>"}):
        (tmp_path / "generation_config.json").write_text(json.dumps(wrong))
        ((key, value),) = wrong.items()
        with pytest.raises(CheckpointError, match=rf"/generation_config\.json: {key} = {value!r}; "):
            load_spec(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        load_spec(tmp_path)
