"""Loading: every broken folder is one line that names the file or tensor; shards read their slices and no more."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from paged_batch import CPU
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, VOCAB_SIZE, make_tiny_model

from raytroupe.actors.local_engine import LocalEngine
from raytroupe.actors.staging import NUM_BUFFERS
from raytroupe.actors.weight_reader import CACHE_BYTES
from raytroupe.actors.weights import load_weights
from raytroupe.cluster.errors import CheckpointError
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.request import SamplingParams
from raytroupe.cluster.topology import ShardLayout

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return make_tiny_model("llama", tmp_path / "model")


def load(folder, layout=None, **options):
    return load_weights(folder, load_spec(folder), layout or ShardLayout(), torch.float32, CPU, **options)


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rewrite(folder, change) -> None:
    """Apply `change` to the dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard_files(folder) -> None:
    """Split the single file in two with an index, as save_pretrained does with large models."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_a_missing_folder(tmp_path):
    assert refusal(tmp_path / "nowhere") == f"model folder {tmp_path}/nowhere does not exist"


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"{folder}/config.json is missing")


def test_a_config_that_is_not_json(folder):
    (folder / "config.json").write_text('{"architectures": [')
    assert refusal(folder).startswith(f"{folder}/config.json is not valid JSON")


def test_a_config_that_is_not_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert refusal(folder).startswith(f"{folder}/config.json is not valid JSON")


def test_no_safetensors(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder} holds no safetensors files"
    (folder / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is a pickle, which is never loaded" in refusal(folder)


@pytest.mark.parametrize("size", [0, 5, 2000, -100])
def test_a_truncated_file(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert refusal(folder).startswith(f"{path} is not a complete safetensors file")


def test_an_index_that_names_a_missing_file(folder):
    shard_files(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refusal(folder)
    assert (
        message == f"{folder}/model-00002-of-00002.safetensors is missing, though model.safetensors.index.json names it"
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_not_one(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    assert refusal(folder).startswith(f"{folder}/model.safetensors.index.json is not a safetensors index")


def test_an_index_that_names_the_wrong_file(folder):
    shard_files(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    wrong = next(file for file in set(index["weight_map"].values()) if file != index["weight_map"][Q_PROJ])
    index["weight_map"][Q_PROJ] = wrong
    path.write_text(json.dumps(index))
    assert refusal(folder) == f"{folder}/{wrong}: tensor {Q_PROJ} is missing, though the index names this file"


def test_a_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop(Q_PROJ))
    assert refusal(folder) == f"{folder}: tensor {Q_PROJ} is missing from the checkpoint"


@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_wrong_shape(folder, name):
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))
    expected = {Q_PROJ: [48, 40], "model.norm.weight": [40]}.get(name, [VOCAB_SIZE, 40])
    found = [expected[0] - 1, *expected[1:]]
    assert refusal(folder) == (
        f"{folder}/model.safetensors: tensor {name} has shape {found}, but config.json implies {expected}"
    )


def test_a_quantised_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.int8)}))
    assert f"tensor {Q_PROJ} has dtype int8, but config.json implies a tensor that is not quantised" in refusal(folder)


def test_sharded_files_and_files_without_an_index_give_the_same_weights(folder, tmp_path):
    whole = load(folder)
    sharded = shutil.copytree(folder, tmp_path / "sharded")
    shard_files(sharded)
    for _ in range(2):
        again = load(sharded)
        assert torch.equal(again.layers[1].qkv, whole.layers[1].qkv)
        assert torch.equal(again.head, whole.head)
        (sharded / "model.safetensors.index.json").unlink(missing_ok=True)


def test_matrices_are_fused_and_cut_by_rank(folder):
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.2."
    weights = load(folder, ShardLayout(tp_rank=1, tp_size=2)).layers[2]
    q, k, v = (tensors[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
    gate, up = (tensors[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(weights.qkv, torch.cat((q[24:], k[12:], v[12:])))
    assert torch.equal(weights.output, tensors[f"{layer}self_attn.o_proj.weight"][:, 24:])
    assert torch.equal(weights.mlp.gate_up, torch.cat((gate[28:], up[28:])))
    assert torch.equal(weights.mlp.down, tensors[f"{layer}mlp.down_proj.weight"][:, 28:])


def test_the_vocabulary_is_padded_with_zeros(folder):
    tensors = load_file(folder / "model.safetensors")
    shares = [load(folder, ShardLayout(tp_rank=rank, tp_size=2)).head for rank in range(2)]
    assert [len(share) for share in shares] == [66, 66]
    assert torch.equal(torch.cat(shares)[:VOCAB_SIZE], tensors["lm_head.weight"])
    assert not shares[1][65].any()


def test_tied_embeddings_are_one_tensor_on_one_stage_and_two_on_two(tmp_path):
    folder = make_tiny_model("llama3", tmp_path)
    whole = load(folder)
    assert whole.head is whole.embedding
    last = load(folder, ShardLayout(pp_rank=1, pp_size=2))
    assert last.embedding is None
    assert torch.equal(last.head, whole.embedding)
    assert load(folder, ShardLayout(pp_rank=0, pp_size=2)).head is None


def test_row_parallel_biases_are_added_once(tmp_path):
    folder = make_tiny_model("llama3", tmp_path)
    first, second = (load(folder, ShardLayout(tp_rank=rank, tp_size=2)).layers[0] for rank in range(2))
    assert first.output_bias is not None
    assert first.mlp.down_bias is not None
    assert second.output_bias is None
    assert second.mlp.down_bias is None


def test_progress_reaches_the_total(folder):
    calls: list[tuple[int, int]] = []
    load(folder, progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert {total for _, total in calls} == {done[-1]}
    assert done[-1] == sum(t.numel() * 4 for t in load_file(folder / "model.safetensors").values())


def test_weights_become_the_asked_dtype_and_norms_stay_float32(folder):
    weights = load_weights(folder, load_spec(folder), ShardLayout(), torch.bfloat16, CPU)
    assert weights.layers[0].qkv.dtype == weights.head.dtype == torch.bfloat16
    assert weights.layers[0].input_norm.dtype == weights.final_norm.dtype == torch.float32


PEAK = """
import resource, sys, pathlib, torch
from raytroupe.actors.weights import load_weights
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.topology import ShardLayout
folder = pathlib.Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
layout = ShardLayout(tp_rank=0, tp_size=2)
weights = load_weights(folder, load_spec(folder), layout, torch.bfloat16, torch.device("cpu"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_loading_needs_little_more_memory_than_the_slice(tmp_path):
    """A 170 MB float32 file, of which each of two shards keeps a quarter: half the weights in half the bytes."""
    folder = make_tiny_model(
        "llama", tmp_path, hidden_size=1024, intermediate_size=1024, num_hidden_layers=10, head_dim=16
    )
    slice_bytes = (folder / "model.safetensors").stat().st_size / 4
    buffers = 2 * (NUM_BUFFERS + 1) * CACHE_BYTES
    output = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(output.stdout) < 1.1 * slice_bytes + buffers


def flatten(weights, layer: int) -> dict:
    """Every tensor of a layer, by name."""
    fields = dataclasses.asdict(weights.layers[layer])
    mlp = fields.pop("mlp")
    return {name: tensor for name, tensor in (fields | mlp).items() if isinstance(tensor, torch.Tensor)}


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_weights_have_the_checkpoints_shapes_and_need_no_checkpoint(tmp_path, family):
    folder = make_tiny_model(family, tmp_path / "model")
    real = load(folder)
    (folder / "model.safetensors").unlink()
    dummy = load(folder, load_format="dummy")
    for layer in range(len(real.layers)):
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in flatten(dummy, layer).items()}
        assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in flatten(real, layer).items()}
    assert dummy.embedding.shape == real.embedding.shape
    assert (dummy.head is dummy.embedding) == (real.head is real.embedding)
    assert dummy.final_norm.eq(1.0).all()


def test_dummy_weights_are_normal_the_same_every_time_and_of_the_asked_dtype(folder):
    spec = load_spec(folder)
    first, second = (load(folder, load_format="dummy") for _ in range(2))
    assert torch.equal(first.layers[1].qkv, second.layers[1].qkv)
    assert not torch.equal(first.layers[1].qkv, first.layers[2].qkv)
    assert first.embedding.mean().abs().item() < 0.002
    assert 0.018 < first.embedding.std().item() < 0.022
    halves = load_weights(folder, spec, ShardLayout(), torch.bfloat16, CPU, load_format="dummy")
    assert halves.layers[1].qkv.dtype == torch.bfloat16
    assert halves.layers[1].input_norm.dtype == torch.float32


def test_dummy_weights_that_several_shards_hold_are_the_same_on_all(tmp_path):
    folder = make_tiny_model("mixtral", tmp_path)
    first, second = (load(folder, ShardLayout(tp_rank=rank, tp_size=2), load_format="dummy") for rank in range(2))
    assert torch.equal(first.layers[0].mlp.router, second.layers[0].mlp.router)
    assert not torch.equal(first.layers[0].output, second.layers[0].output)
    assert not second.head[65].any()


def test_an_engine_over_dummy_weights_answers(folder):
    (folder / "model.safetensors").unlink()
    with LocalEngine(folder, dtype="float32", device="cpu", num_threads=1, load_format="dummy") as engine:
        answers = [engine.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8))[0] for _ in range(2)]
    assert answers[0].tokens == answers[1].tokens
    assert len(set(answers[0].tokens)) > 1
