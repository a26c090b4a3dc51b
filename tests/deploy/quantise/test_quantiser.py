"""A quantised model means the same to its format's library, to transformers and to Troupe, and runs repeat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from dense_copy import dense_tensors, load_tensors, random_tokens, write_dense_copy
from paged_batch import DecoderDriver, random_sequences
from tiny_models import load_reference, make_tiny_model

from raytroupe.cluster.errors import ConfigError
from raytroupe.cluster.evaluation_report import REPORT_FILE
from raytroupe.deploy.quantise.checkpoint_writer import divide, merge, write_weights
from raytroupe.deploy.quantise.compressed_tensors import quantization_config
from raytroupe.deploy.quantise.options import CHANNEL, Method, QuantiseOptions
from raytroupe.deploy.quantise.quantiser import Quantiser
from raytroupe.deploy.quantise.summary import Summary

SEQUENCES = random_tokens(10, 40, 131)


def options(method: str = "gptq", bits: int = 4, group_size: int = 8, **others) -> QuantiseOptions:
    return QuantiseOptions(Method(method), bits, group_size, **others)


def quantise(source: Path, out: Path, chosen: QuantiseOptions, sequences=SEQUENCES, **arguments) -> Summary:
    return Quantiser(source, out, chosen, sequences, **arguments).run()


def transformers_logits(folder: Path) -> torch.Tensor:
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([SEQUENCES[0]])).logits[0]


def troupe_logits(folder: Path) -> torch.Tensor:
    driver = DecoderDriver(folder, random_sequences([30], 131), way="torch")
    driver.step({0: 30})
    return driver.all_logits(0)


CASES = {
    "llama3": options("awq", 4, 8),  # biases, tied embeddings
    "qwen2": options("gptq", 3, 8),
    "gemma2": options("awq", 8, 8),
    "phi3": options("gptq", 4, CHANNEL),
    "olmo2": options("awq", 3, 8),
    "llama": options("rtn", 4, 8, head_bits=8),
}


@pytest.mark.parametrize("family", CASES)
def test_transformers_and_troupe_load_what_was_written(family: str, tmp_path: Path) -> None:
    source, out = make_tiny_model(family, tmp_path / "source"), tmp_path / "out"
    summary = quantise(source, out, CASES[family])
    dense = write_dense_copy(out, tmp_path / "dense")
    torch.testing.assert_close(transformers_logits(out), transformers_logits(dense), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(troupe_logits(out), troupe_logits(dense), rtol=1e-4, atol=1e-4)
    assert summary.ratio < 1
    kinds = {weight.kind for weight in summary.weights}
    assert kinds == {"qkv", "output", "gate_up", "down"} | ({"head"} if family == "llama" else set())


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_zero_points_are_read_as_they_were_meant(method: str, tmp_path: Path) -> None:
    # transformers is not asked: compressed-tensors 0.20 expects other shapes of zero points there than it writes.
    source, out = make_tiny_model("llama3", tmp_path / "source"), tmp_path / "out"
    quantise(source, out, options(method, symmetric=False))
    assert load_tensors(out)["model.layers.0.self_attn.k_proj.weight_zero_point"].shape == (3, 5)
    dense = write_dense_copy(out, tmp_path / "dense")
    torch.testing.assert_close(troupe_logits(out), troupe_logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_are_quantised_one_by_one(family: str, method: str, tmp_path: Path) -> None:
    source, out = make_tiny_model(family, tmp_path / "source"), tmp_path / "out"
    quantise(source, out, options(method, group_size=4))
    names = load_tensors(out)
    assert not any("gate.weight_packed" in name or "expert_gate.weight_packed" in name for name in names)
    assert sum("experts." in name and name.endswith("weight_packed") for name in names) >= 4 * 5 * 3 - 15
    dense = write_dense_copy(out, tmp_path / "dense")
    torch.testing.assert_close(troupe_logits(out), troupe_logits(dense), rtol=1e-4, atol=1e-4)


def test_experts_that_met_few_tokens_are_rounded_to_nearest(tmp_path: Path) -> None:
    source = make_tiny_model("mixtral", tmp_path / "source")
    few = quantise(source, tmp_path / "few", options(), SEQUENCES[:1])
    quantise(source, tmp_path / "plain", options("rtn"))
    assert {weight.kind for weight in few.weights if weight.few_inputs} >= {"experts' gate_up", "experts' down"}
    few_tensors, plain_tensors = load_tensors(tmp_path / "few"), load_tensors(tmp_path / "plain")
    name = next(name for name in plain_tensors if "experts.0" in name and name.endswith("weight_packed"))
    assert torch.equal(few_tensors[name], plain_tensors[name])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_methods_keep_the_logits_better(method: str, tmp_path: Path) -> None:
    source = make_tiny_model("llama", tmp_path / "source", initializer_range=0.1)
    expected = transformers_logits(source)
    errors = {}
    for name in ("rtn", method):
        quantise(source, tmp_path / name, options(name, 3))
        dense = write_dense_copy(tmp_path / name, tmp_path / f"{name}-dense")
        errors[name] = (transformers_logits(dense) - expected).norm().item()
    assert errors[method] < errors["rtn"]


def test_eight_bit_activations_are_asked_for(tmp_path: Path) -> None:
    source, out = make_tiny_model("llama", tmp_path / "source"), tmp_path / "out"
    quantise(source, out, options("rtn", 8, CHANNEL, activation_bits=8))
    weight = load_tensors(out)["model.layers.0.self_attn.q_proj.weight"]
    assert weight.dtype == torch.int8
    expected = transformers_logits(source)
    error = (transformers_logits(out) - expected).norm() / expected.norm()
    assert 0 < error < 0.1
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True


def test_what_is_not_quantised_is_copied(tmp_path: Path) -> None:
    source, out = make_tiny_model("llama", tmp_path / "source"), tmp_path / "out"
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / REPORT_FILE).write_text("{}")
    quantise(source, out, options("rtn"), None)
    before, after = load_tensors(source), dense_tensors(out)
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "norm" in name or "embed" in name or "lm_head" in name} == same
    assert not (out / REPORT_FILE).exists(), "an evaluation is of one model"
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / ".partial").exists()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (options(bits=5), r"--bits 5 .* 8 or 4 or 3"),
        (options(group_size=3), "--group-size 3"),
        (options(group_size=16), r"--group-size 16 does not divide the 40 inputs of model\.layers\.0\..* 8 or -1"),
        (options(bits=8, activation_bits=8), r"--activations int8 needs --bits 8 --group-size -1"),
        (options(head_bits=3), "--head-bits 3"),
        (options(samples=0), "--samples 0"),
    ],
)
def test_options_that_cannot_work_are_refused(chosen: QuantiseOptions, message: str, tmp_path: Path) -> None:
    source = make_tiny_model("llama", tmp_path / "source")
    with pytest.raises(ConfigError, match=message):
        quantise(source, tmp_path / "out", chosen)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_quantised_are_refused(tmp_path: Path) -> None:
    source = make_tiny_model("llama3", tmp_path / "source")
    with pytest.raises(ConfigError, match="--head-bits needs"):
        quantise(source, tmp_path / "out", options(head_bits=8))
    with pytest.raises(ConfigError, match="--calibration FILE"):
        quantise(source, tmp_path / "out", options("awq"), None)
    quantise(source, tmp_path / "out", options("rtn"), None)
    with pytest.raises(ConfigError, match="quantised already"):
        quantise(tmp_path / "out", tmp_path / "again", options("rtn"), None)


@pytest.mark.parametrize("place", ["quantize_config.json", "quant_config.json", "compression_config", "text_config"])
def test_quantised_sources_are_known_by_every_mark(place: str, tmp_path: Path) -> None:
    source = make_tiny_model("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    packed = quantization_config(options(), [], ["lm_head"])
    if place == "quantize_config.json":
        (source / place).write_text('{"bits": 4, "group_size": 8}')
    elif place == "quant_config.json":
        (source / place).write_text('{"w_bit": 4, "q_group_size": 8, "zero_point": true}')
    elif place == "text_config":
        config["text_config"] = {"quantization_config": packed}
    else:
        config[place] = packed
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantised already"):
        quantise(source, tmp_path / "out", options())


def test_other_parts_of_a_model_stay_as_they_are(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    text = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "vocab_size": 131, "head_dim": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**text, **heads, "max_position_embeddings": 512},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
    )
    transformers.utils.logging.disable_progress_bar()
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(source)
    quantise(source, out, options("rtn"), None)
    loaded = transformers.Gemma3ForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    found = {name: value for name, value in loaded.state_dict().items() if "language_model" not in name}
    expected = {name: value for name, value in model.state_dict().items() if "language_model" not in name}
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert "vision_tower" in " ".join(found)
    assert any(name.endswith("q_proj.weight_packed") for name in loaded.state_dict())


def test_large_models_are_written_to_several_files(tmp_path: Path) -> None:
    source = make_tiny_model("llama", tmp_path / "source")
    (tmp_path / "out").mkdir()
    write_weights(tmp_path / "out", divide(merge(source, set(), []), 40_000), {})
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 40_000 + 4096 for file in files)
    (tmp_path / "out" / "config.json").write_bytes((source / "config.json").read_bytes())
    expected, found = load_reference(source).state_dict(), load_reference(tmp_path / "out").state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
