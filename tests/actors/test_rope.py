"""Our frequencies are transformers', for every rope type and over the parameters that published configs use."""

import math

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from raytroupe.actors.rope import Rotary, dynamic_frequencies, exponents, inverse_frequencies
from raytroupe.cluster.rope_spec import parse_rope
from raytroupe.kernels.backend import load_kernels

HEAD_DIM = 64
CASES = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2, "attention_factor": 0.9},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    {"rope_type": "dynamic", "factor": 2.0},
]

KERNELS = load_kernels(torch.device("cpu"), torch.float32)


def reference(config, **options):
    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"), **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rope_type"])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_frequencies_of_scaled_types(case, theta):
    parameters = {"rope_theta": theta, **case}
    config = LlamaConfig(
        hidden_size=HEAD_DIM * 2,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters=dict(parameters),
    )
    expected, attention_factor = reference(config)
    spec = parse_rope(parameters, head_dim=HEAD_DIM, max_position=131072)
    torch.testing.assert_close(inverse_frequencies(spec, 131072), expected, rtol=1e-6, atol=0)
    assert spec.attention_factor == pytest.approx(attention_factor)


@pytest.mark.parametrize("served", [4096, 4097, 131072])
@pytest.mark.parametrize("partial", [1.0, 0.75])
def test_longrope_chooses_by_the_served_context(served, partial):
    dims = int(HEAD_DIM * partial) // 2
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": partial,
        "short_factor": [1.0 + i / 100 for i in range(dims)],
        "long_factor": [2.0 + i / 10 for i in range(dims)],
        "original_max_position_embeddings": 4096,
    }
    config = Phi3Config(
        hidden_size=HEAD_DIM * 2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=dict(parameters),
    )
    expected, attention_factor = reference(config, seq_len=served)
    spec = parse_rope(parameters, head_dim=HEAD_DIM, max_position=131072)
    torch.testing.assert_close(inverse_frequencies(spec, served), expected, rtol=1e-6, atol=0)
    assert spec.attention_factor == pytest.approx(attention_factor) == math.sqrt(1 + math.log(32) / math.log(4096))


def test_dynamic_frequencies_are_those_of_a_sequence_that_ends_at_the_token():
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
    config = LlamaConfig(
        hidden_size=HEAD_DIM * 2, num_attention_heads=2, max_position_embeddings=256, rope_parameters=dict(parameters)
    )
    spec = parse_rope(parameters, head_dim=HEAD_DIM, max_position=256)
    lengths = [1, 255, 256, 257, 300, 1000]
    ours = dynamic_frequencies(spec, torch.tensor(lengths), exponents(spec))
    for length, frequencies in zip(lengths, ours, strict=True):
        expected, _ = reference(config, seq_len=length)
        torch.testing.assert_close(frequencies, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rope_type"])
def test_a_rotation_depends_on_the_position_only(case):
    spec = parse_rope({"rope_theta": 10000.0, **case}, head_dim=HEAD_DIM, max_position=512)
    rotary = Rotary(spec, 2048, torch.device("cpu"))
    positions = torch.tensor([0, 700, 3, 511, 512, 1999])
    cos, sin = rotary.cos_sin(positions, KERNELS)
    assert cos.shape == sin.shape == (6, HEAD_DIM // 2)
    assert cos.dtype == sin.dtype == torch.float32
    for index in range(6):
        alone_cos, alone_sin = rotary.cos_sin(positions[index : index + 1], KERNELS)
        assert torch.equal(alone_cos[0], cos[index])
        assert torch.equal(alone_sin[0], sin[index])


def test_cosines_and_sines():
    spec = parse_rope({"rope_type": "default", "rope_theta": 100.0}, head_dim=4, max_position=512)
    cos, sin = Rotary(spec, 512, torch.device("cpu")).cos_sin(torch.tensor([5]), KERNELS)
    a, b = 5.0, 5.0 / 10.0
    torch.testing.assert_close(cos, torch.tensor([[math.cos(a), math.cos(b)]]))
    torch.testing.assert_close(sin, torch.tensor([[math.sin(a), math.sin(b)]]))


def test_they_are_written_where_they_are_wanted_with_the_attention_factor():
    parameters = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "attention_factor": 0.5}
    spec = parse_rope(parameters, head_dim=4, max_position=512)
    rotary, positions = Rotary(spec, 512, torch.device("cpu")), torch.tensor([0, 9, 400])
    buffers = torch.full((5, 2), 7.0), torch.full((5, 2), 7.0)
    cos, sin = rotary.cos_sin(positions, KERNELS, out=(buffers[0][:3], buffers[1][:3]))
    assert cos.data_ptr() == buffers[0].data_ptr()
    assert sin.data_ptr() == buffers[1].data_ptr()
    for given, fresh, buffer in zip((cos, sin), rotary.cos_sin(positions, KERNELS), buffers, strict=True):
        assert torch.equal(given, fresh)
        assert (buffer[3:] == 7.0).all()
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((3, 2), 0.25))
