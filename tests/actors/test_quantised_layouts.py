"""Quantised checkpoints of every format give exactly the numbers that they stand for, whole and in slices."""

from __future__ import annotations

import json

import pytest
import torch
from paged_batch import CPU
from quantised_checkpoints import (
    FORMATS,
    change_config,
    compressed,
    fp8,
    gptq,
    is_linear,
    quantise,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from raytroupe.actors.weights import LayerWeights, MLPWeights, MoEWeights, Weights, load_weights
from raytroupe.cluster.errors import CheckpointError
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.topology import ShardLayout, all_layouts, quantised_layer_bytes, weight_bytes
from raytroupe.kernels.quantised_weight import QuantisedWeight, Weight

LAYER = "model.layers.1."
Q_PROJ = f"{LAYER}self_attn.q_proj"


def load(folder, layout=None, **options) -> Weights:
    return load_weights(folder, load_spec(folder), layout or ShardLayout(), torch.float32, CPU, **options)


def dense(weight: Weight, inputs: int) -> Tensor:
    return weight.dense(inputs, torch.float32) if isinstance(weight, QuantisedWeight) else weight


def matrices(layer: LayerWeights) -> dict[str, Weight]:
    """All matrices of a layer, by name; those of experts by number too."""
    found: dict[str, Weight] = {"qkv": layer.qkv, "output": layer.output}
    mlp = layer.mlp
    if isinstance(mlp, MLPWeights):
        return found | {"gate_up": mlp.gate_up, "down": mlp.down}
    found["router"] = mlp.router
    for number, (gate_up, down) in enumerate(zip(mlp.gate_up, mlp.down, strict=True)):
        found |= {f"gate_up {number}": gate_up, f"down {number}": down}
    if mlp.shared is not None:
        found |= {"shared gate_up": mlp.shared.gate_up, "shared down": mlp.shared.down}
    return found


def assert_equal(quantised, reference, layout=None) -> Weights:
    """Every matrix of a shard is exactly that of the dense model."""
    mine, whole = load(quantised, layout), load(reference, layout)
    for layer, expected in zip(mine.layers, whole.layers, strict=True):
        pairs = zip(matrices(layer).items(), matrices(expected).values(), strict=True)
        for (name, weight), wanted in pairs:
            assert isinstance(wanted, Tensor)
            torch.testing.assert_close(dense(weight, wanted.shape[1]), wanted, rtol=0, atol=0, msg=name)
    return mine


def rewrite(folder, change) -> None:
    """Apply `change` to the dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_exactly_whole_and_in_slices(name, tmp_path):
    quantised, reference = quantise("llama", tmp_path, FORMATS[name])
    weights = assert_equal(quantised, reference)
    assert all(isinstance(weight, QuantisedWeight) for weight in matrices(weights.layers[0]).values())
    for layout in all_layouts(2, 2):
        assert_equal(quantised, reference, layout)


@pytest.mark.parametrize("name", ["gptq int4 g32", "packed int4 g32", "int8 of a tensor"])
def test_fused_matrices(name, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    quantised, reference = quantise("phi3", tmp_path, FORMATS[name], rope_parameters=rope)
    for layout in (None, *all_layouts(2, 1)):
        weights = assert_equal(quantised, reference, layout)
        assert isinstance(weights.layers[0].qkv, QuantisedWeight)


@pytest.mark.parametrize("name", ["gptq int4 act order", "awq g32", "packed int4 g32", "fp8 blocks"])
def test_experts_are_quantised_and_gates_may_not_be(name, tmp_path):
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 32, "num_hidden_layers": 2}
    quantised, reference = quantise("qwen2_moe", tmp_path, FORMATS[name], **sizes)
    for layout in (None, *all_layouts(2, 1)):
        weights = assert_equal(quantised, reference, layout)
        mlp = weights.layers[0].mlp
        assert isinstance(mlp, MoEWeights)
        assert all(isinstance(weight, QuantisedWeight) for weight in mlp.gate_up)
        assert isinstance(mlp.router, Tensor)
    assert weights.layers[0].mlp.shared_gate is not None


def test_a_router_that_is_quantised_is_expanded(tmp_path):
    form = compressed("pack-quantized", num_bits=4, group_size=32, strategy="group")
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 32, "num_hidden_layers": 2}
    quantised, reference = quantise(
        "qwen2_moe", tmp_path, form, lambda module: is_linear(module) or module.endswith("gate"), **sizes
    )
    weights = assert_equal(quantised, reference)
    assert isinstance(weights.layers[0].mlp.router, Tensor)
    assert isinstance(weights.layers[0].mlp.shared_gate, Tensor)


def ignoring(*names: str):
    form = compressed("pack-quantized", num_bits=4, group_size=32, strategy="group")
    form.config["ignore"] = ["lm_head", *names]
    return form


def test_parts_that_are_left_out_stay_as_they_are(tmp_path):
    form = ignoring("re:.*layers\\.0\\..*", f"{LAYER}self_attn.v_proj", "re:.*down_proj$")
    form.config["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    left = ("layers.0.", "1.self_attn.v_proj", "down_proj")
    quantised, reference = quantise(
        "llama", tmp_path, form, lambda module: is_linear(module) and not any(part in module for part in left)
    )
    for layout in (None, *all_layouts(2, 1)):
        weights = assert_equal(quantised, reference, layout)
        assert all(isinstance(weight, Tensor) for weight in matrices(weights.layers[0]).values())
        kinds = {name: type(weight) for name, weight in matrices(weights.layers[1]).items()}
        # Queries and keys are expanded, since values are one matrix with them.
        assert kinds == {"qkv": Tensor, "output": QuantisedWeight, "gate_up": QuantisedWeight, "down": Tensor}
        assert isinstance(weights.layers[2].qkv, QuantisedWeight)


@pytest.mark.parametrize("name", ["gptq int4 g32 with zeros", "packed int4 g32", "int8"])
def test_a_quantised_output_projection(name, tmp_path):
    """131 rows, of which the second of two shards has one fewer."""
    form = FORMATS[name]
    config = {**form.config, "lm_head": True} if "gptq" in name else {**form.config, "ignore": []}
    # GPTQ packs zero points along the outputs, which need not come out even.
    quantised, reference = quantise(
        "llama", tmp_path, type(form)(config, form.pack), lambda module: is_linear(module) or module == "lm_head"
    )
    for layout in (ShardLayout(), *all_layouts(2, 1)):
        head = load(quantised, layout).head
        assert isinstance(head, QuantisedWeight)
        assert torch.equal(head.dense(64, torch.float32), load(reference, layout).head)


def test_a_tied_output_projection_is_the_embedding(tmp_path):
    form = compressed("pack-quantized", num_bits=4, group_size=32, strategy="group")
    form.config["ignore"] = []
    quantised, reference = quantise("llama3", tmp_path, form, head_dim=16)
    weights = assert_equal(quantised, reference)
    assert weights.head is weights.embedding


def test_targets_with_schemes_of_their_own(tmp_path):
    four = compressed("pack-quantized", num_bits=4, group_size=32, strategy="group")
    eight = compressed("int-quantized", num_bits=8, strategy="channel")
    groups = {
        "group_0": {**four.config["config_groups"]["group_0"], "targets": ["Linear"]},
        "group_1": {**eight.config["config_groups"]["group_0"], "targets": ["re:.*down_proj"]},
    }
    config = {**four.config, "format": "mixed-precision", "config_groups": groups}

    def pack(weight: Tensor):
        return (eight if weight.shape[1] == 96 else four).pack(weight)

    quantised, reference = quantise("llama", tmp_path, type(four)(config, pack))
    layer = assert_equal(quantised, reference).layers[0]
    assert layer.qkv.bits == 4
    assert layer.mlp.down.bits == 8
    assert load_spec(quantised).quantisation.label == "int8 and int4 g32"


def test_inputs_in_the_order_of_activations_of_compressed_tensors(tmp_path):
    form = compressed("pack-quantized", num_bits=4, group_size=32, strategy="group")
    form.config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    order = {width: torch.randperm(width, generator=torch.Generator().manual_seed(width)) for width in (64, 96)}

    def pack(weight: Tensor):
        parts, sorted_weight = form.pack(weight[:, order[weight.shape[1]]])
        inverse = order[weight.shape[1]].argsort()
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

        integers = unpack_from_int32(parts["weight_packed"], 4, weight.shape)[:, inverse]
        parts["weight_packed"] = pack_to_int32(integers.contiguous(), 4)
        parts["weight_g_idx"] = (torch.arange(weight.shape[1]) // 32)[inverse].int()
        return parts, sorted_weight[:, inverse]

    quantised, reference = quantise("llama", tmp_path, type(form)(form.config, pack))
    for layout in (None, *all_layouts(2, 1)):
        weights = assert_equal(quantised, reference, layout)
        assert weights.layers[0].qkv.order is not None
    rewrite(quantised, lambda tensors: [tensors[name].fill_(-1) for name in tensors if name.endswith("weight_g_idx")])
    assert load(quantised).layers[0].qkv.order is None  # -1: they follow one another


def test_a_slice_of_reordered_inputs_is_filled_up_with_columns_of_zeros(tmp_path):
    quantised, _ = quantise("llama", tmp_path, FORMATS["gptq int4 act order"])
    whole = load(quantised).layers[0].mlp.down
    part = load(quantised, ShardLayout(0, 2)).layers[0].mlp.down
    assert whole.shape == (64, 96)
    assert part.shape[1] % 2 == 0
    assert 48 < part.shape[1] <= 96
    assert sorted(set(part.order.tolist())) == list(range(48))


def test_bytes_in_memory_are_those_that_the_planner_counts(tmp_path):
    for number, (name, form) in enumerate(FORMATS.items()):
        quantised, _ = quantise("llama", tmp_path / str(number), form)
        spec = load_spec(quantised)
        layers = load(quantised).layers
        held = [weight for layer in layers for weight in matrices(layer).values()]
        counted, unquantised = quantised_layer_bytes(spec, ShardLayout())
        scale = held[0].scales
        wide = (2 if not spec.quantisation.schemes[0].is_float else 4) - scale.element_size()
        orders = sum(weight.order.nbytes for weight in held if weight.order is not None)
        exact = sum(weight.nbytes + weight.scales.numel() * wide for weight in held) - orders
        assert counted == exact, name
        assert unquantised == 2 * sum(weight.shape[0] * weight.shape[1] for weight in held)
        tables = 2 * 131 * 64 * 2
        assert weight_bytes(spec, ShardLayout(), 2) == counted + tables


def test_int4_in_groups_of_128_takes_little_more_than_a_quarter(tmp_path):
    form = compressed("pack-quantized", num_bits=4, group_size=128, strategy="group", symmetric=False)
    quantised, _ = quantise("llama", tmp_path, form, hidden_size=128, intermediate_size=256, head_dim=32)
    now, before = quantised_layer_bytes(load_spec(quantised), ShardLayout())
    assert now <= 0.27 * before


def test_progress_reaches_the_total(tmp_path):
    quantised, _ = quantise("llama", tmp_path, FORMATS["gptq int4 g32"])
    calls: list[tuple[int, int]] = []
    load(quantised, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1]
    assert len({total for _, total in calls}) == 1


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_a_missing_tensor_is_named(part, tmp_path):
    quantised, _ = quantise("llama", tmp_path, FORMATS["packed int4 g32"])
    rewrite(quantised, lambda tensors: tensors.pop(f"{Q_PROJ}.{part}"))
    assert refusal(quantised) == f"{quantised}: tensor {Q_PROJ}.{part} is missing from the checkpoint"


@pytest.mark.parametrize(
    ("name", "part", "cut"),
    [
        ("packed int4 g32", "weight_packed", [64, 7]),
        ("packed int4 g32", "weight_scale", [64, 1]),
        ("packed int4 with zeros", "weight_zero_point", [7, 2]),
        ("gptq int4 g32", "qweight", [7, 64]),
        ("gptq int4 g32", "scales", [1, 64]),
        ("gptq int4 g32", "qzeros", [2, 7]),
        ("gptq int4 g32", "g_idx", [63]),
        ("awq g32", "qweight", [63, 8]),
        ("fp8 blocks", "weight_scale_inv", [1, 2]),
    ],
)
def test_a_wrong_shape_is_named(name, part, cut, tmp_path):
    quantised, _ = quantise("llama", tmp_path, FORMATS[name])
    corner = tuple(slice(0, length) for length in cut)
    full = f"{Q_PROJ}.{part}"
    rewrite(quantised, lambda tensors: tensors.update({full: tensors[full][corner].clone()}))
    assert f"tensor {full} has shape {cut}, but config.json implies" in refusal(quantised)


def test_a_wrong_dtype_is_named(tmp_path):
    quantised, _ = quantise("llama", tmp_path, FORMATS["int8"])
    full = f"{Q_PROJ}.weight"
    rewrite(quantised, lambda tensors: tensors.update({full: tensors[full].view(torch.float8_e4m3fn)}))
    assert f"tensor {full} has dtype float8_e4m3fn, but config.json implies int8" in refusal(quantised)


def test_a_group_that_there_is_not(tmp_path):
    quantised, _ = quantise("llama", tmp_path, FORMATS["gptq int4 act order"])
    rewrite(quantised, lambda tensors: tensors[f"{Q_PROJ}.g_idx"].__setitem__(5, 2))
    assert f"tensor {Q_PROJ}.g_idx names group 2, but config.json implies groups 0 to 1" in refusal(quantised)


def test_config_and_checkpoint_that_disagree(tmp_path):
    quantised, reference = quantise("llama", tmp_path, FORMATS["packed int4 g32"])
    config = json.loads((quantised / "config.json").read_text())["quantization_config"]
    change_config(reference, quantization_config=config)
    message = refusal(reference)
    module = "model.layers.0.mlp.gate_proj"
    assert message == (
        f"{reference}/model.safetensors: tensor {module}.weight is not quantised, but config.json says that it is "
        f"(int4 g32): name {module} among the modules that its quantization_config leaves out"
    )
    change_config(quantised, quantization_config={**config, "ignore": ["lm_head", Q_PROJ]})
    assert (
        f"tensor {Q_PROJ}.weight is missing from the checkpoint, which holds it quantised, though config.json does not"
    ) in refusal(quantised)


def test_reordered_inputs_need_their_order(tmp_path):
    form = gptq(4, 32, act_order=True)
    quantised, _ = quantise("llama", tmp_path, form)
    rewrite(quantised, lambda tensors: tensors.pop(f"{Q_PROJ}.g_idx"))
    assert f"tensor {Q_PROJ}.g_idx is missing" in refusal(quantised)


def test_blocks_that_a_shard_cuts(tmp_path):
    quantised, reference = quantise("llama", tmp_path, fp8((24, 40)))
    for layout in (None, *all_layouts(2, 1)):
        assert_equal(quantised, reference, layout)
