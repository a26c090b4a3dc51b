"""A quantised model computes what the dense model of the same numbers computes, on one shard and on several."""

from __future__ import annotations

import pytest
import torch
import transformers
from paged_batch import DecoderDriver, random_sequences
from quantised_checkpoints import FORMATS, Format, compressed, fp8, quantise
from shard_threads import assert_equals_one_shard
from tiny_models import FAMILIES, VOCAB_SIZE
from torch import Tensor

from raytroupe.actors.local_engine import LocalEngine
from raytroupe.actors.rehearsal import rehearsed_spec
from raytroupe.actors.weights import load_weights
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.request import SamplingParams
from raytroupe.cluster.topology import ShardLayout, layer_matrices
from raytroupe.kernels.quantised_weight import QuantisedWeight

CPU = torch.device("cpu")
SEQUENCE = random_sequences([40], VOCAB_SIZE)[0]
INT4 = compressed("pack-quantized", num_bits=4, group_size=32, strategy="group")
SIZES = {"phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}}


def logits(folder, way: str = "torch") -> Tensor:
    """[positions, vocab] of one sequence."""
    driver = DecoderDriver(folder, [SEQUENCE], way=way)
    driver.step({0: len(SEQUENCE)})
    return driver.all_logits(0)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("fp8 blocks", "fp8 one scale")])
def test_logits_are_those_of_the_dense_model(name, tmp_path):
    quantised, reference = quantise("llama", tmp_path, FORMATS[name], num_hidden_layers=2)
    assert relative_error(logits(quantised), logits(reference)) < 1e-5


@pytest.mark.parametrize(
    "form",
    [
        compressed("int-quantized", activations=True, num_bits=8, strategy="channel"),
        compressed("float-quantized", activations=True, num_bits=8, type="float", strategy="channel"),
        fp8((32, 32)),
    ],
    ids=["int8", "fp8", "fp8 blocks"],
)
def test_activations_of_8_bits_are_near(form, tmp_path):
    quantised, reference = quantise("llama", tmp_path, form, num_hidden_layers=2)
    assert load_weights_of(quantised).layers[0].qkv.activations is not None
    assert 1e-4 < relative_error(logits(quantised), logits(reference)) < 0.2


@pytest.mark.parametrize("name", FORMATS)
def test_compiled_kernels_lose_little_and_a_recorded_step_loses_no_more(name, tmp_path):
    """Activations are rounded to 8 bits, and floats of 8 bits expanded."""
    quantised, _ = quantise("llama", tmp_path, FORMATS[name], num_hidden_layers=2)
    immediate = logits(quantised, "native")
    assert torch.equal(logits(quantised, "recorded"), immediate)
    assert relative_error(immediate, logits(quantised)) < (0.3 if "fp8" in name else 0.1)


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "qwen2"])
def test_compiled_kernels_in_other_families(family, tmp_path):
    quantised, _ = quantise(family, tmp_path, INT4, num_hidden_layers=2)
    immediate = logits(quantised, "native")
    assert torch.equal(logits(quantised, "recorded"), immediate)
    assert relative_error(immediate, logits(quantised)) < 0.2  # of experts another may be chosen


def test_two_by_two_shards_in_compiled_kernels(tmp_path):
    """Groups are whole on every shard. Sums over shards differ in their last bits, so an input may round otherwise."""
    quantised, _ = quantise(
        "llama", tmp_path, compressed("pack-quantized", num_bits=4, group_size=16, strategy="group")
    )
    expected = logits(quantised, "recorded")
    tolerance = 0.02 * float(expected.abs().max())
    assert_equals_one_shard(quantised, tp=2, pp=2, way="recorded", reference="recorded", tolerance=tolerance)


def load_weights_of(folder, **options):
    return load_weights(folder, load_spec(folder), ShardLayout(), torch.float32, CPU, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    moe = {"moe_intermediate_size": 32} if "moe" in family else {}
    shared = {"shared_expert_intermediate_size": 32} if family == "qwen2_moe" else {}
    sizes = {"num_hidden_layers": 2, **moe, **shared, **SIZES.get(family, {})}
    quantised, reference = quantise(family, tmp_path, INT4, **sizes)
    assert isinstance(load_weights_of(quantised).layers[0].output, QuantisedWeight)
    assert relative_error(logits(quantised), logits(reference)) < 1e-5


@pytest.mark.parametrize("name", ["gptq int4 act order", "awq g32", "packed int4 with zeros", "fp8 blocks"])
def test_two_by_two_shards_equal_one(name, tmp_path):
    form = FORMATS[name]
    if name == "fp8 blocks":  # what activations are rounded to depends on where a row is cut
        form = compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32])
    quantised, _ = quantise("llama", tmp_path, form)
    assert_equals_one_shard(quantised, tp=2, pp=2, way="torch")


def transformers_logits(folder) -> Tensor:
    """The same from transformers, which computes with the library of the format."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return model.eval()(torch.tensor([SEQUENCE])).logits[0]


@pytest.mark.parametrize(
    "form",
    [
        INT4,
        compressed("pack-quantized", num_bits=3, group_size=32, strategy="group"),
        compressed("float-quantized", activations=True, num_bits=8, type="float", strategy="channel"),
    ],
    ids=["int4", "int3", "fp8"],
)
def test_transformers_agrees(form, tmp_path):
    quantised, _ = quantise("llama", tmp_path, form, num_hidden_layers=2)
    assert relative_error(logits(quantised), transformers_logits(quantised)) < 1e-5


def test_int8_activations_lose_no_more_than_in_transformers(tmp_path):
    """Both round to the nearest of 255, but with scales that differ by 0.4 %."""
    form = compressed("int-quantized", activations=True, num_bits=8, strategy="channel")
    quantised, reference = quantise("llama", tmp_path, form, num_hidden_layers=2)
    exact = logits(reference)
    assert relative_error(logits(quantised), exact) < 1.3 * relative_error(transformers_logits(quantised), exact)


@pytest.mark.parametrize("name", ["gptq int4 act order", "packed int4 g32", "int8", "fp8 blocks"])
def test_dummy_weights_have_the_checkpoints_shapes(name, tmp_path):
    quantised, _ = quantise("llama", tmp_path, FORMATS[name])
    real = load_weights_of(quantised).layers[1]
    (quantised / "model.safetensors").unlink()
    dummy = load_weights_of(quantised, load_format="dummy").layers[1]
    for mine, wanted in ((dummy.qkv, real.qkv), (dummy.mlp.down, real.mlp.down)):
        assert isinstance(mine, QuantisedWeight)
        assert (mine.values.shape, mine.values.dtype) == (wanted.values.shape, wanted.values.dtype)
        assert (mine.bits, mine.group_size, mine.activations) == (wanted.bits, wanted.group_size, wanted.activations)
        assert mine.scales.shape == wanted.scales.shape
        assert (mine.order is None) == (wanted.order is None)
        assert 0.01 < mine.dense(64 if mine is dummy.qkv else 96, torch.float32).std() < 0.03


def test_an_engine_answers_with_quantised_and_with_dummy_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TROUPE_KERNELS", "torch")
    quantised, reference = quantise("llama", tmp_path, INT4)
    greedy = SamplingParams(temperature=0, max_tokens=12)

    def answer(folder, **options) -> list[int]:
        with LocalEngine(folder, dtype="float32", device="cpu", num_threads=1, **options) as engine:
            return engine.generate([[5, 6, 7]], greedy)[0].tokens

    assert answer(quantised) == answer(reference)
    assert len(set(answer(quantised, load_format="dummy"))) > 1


def test_the_rehearsal_has_a_layer_of_every_kind(tmp_path):
    config = {**INT4.config, "ignore": ["lm_head", "re:.*layers\\.[02].*", "model.layers.3.self_attn.o_proj"]}
    left = ("layers.0.", "layers.2.", "3.self_attn.o_proj")
    quantised, _ = quantise(
        "llama",
        tmp_path,
        Format(config, INT4.pack),
        lambda module: "_proj" in module and not any(part in module for part in left),
    )
    spec = load_spec(quantised)
    small = rehearsed_spec(spec, ShardLayout())
    assert small.num_layers == 3

    def kinds(of, index) -> list[bool]:
        return [matrix.scheme(of) is not None for matrix in layer_matrices(of, ShardLayout(), index)]

    assert [kinds(small, index) for index in range(3)] == [kinds(spec, index) for index in (0, 1, 3)]
    layers = load_weights(quantised, small, ShardLayout(), torch.float32, CPU, load_format="dummy").layers
    assert [isinstance(layer.output, QuantisedWeight) for layer in layers] == [False, True, False]
