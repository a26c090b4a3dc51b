"""Norm, rotation, activation, linear and mixture kernels against their formulas written out."""

import pytest
import torch
from torch.nn import functional

from raytroupe.kernels.activation import gated_activation
from raytroupe.kernels.backend import CHOICE, load_kernels
from raytroupe.kernels.linear import PackedLinear, PlainLinear, can_pack
from raytroupe.kernels.moe import route, run_experts
from raytroupe.kernels.norm import rms_norm, scale_by_rms, sum_of_squares
from raytroupe.kernels.rotary import rotate_
from raytroupe.kernels.torch_kernels import TorchKernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(1, 40), (5, 3, 12)])
def test_rms_norm(shape):
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    expected = functional.rms_norm(x.double(), (shape[-1],), weight.double(), 1e-5).float()
    before = x.clone()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)
    assert torch.equal(x, before)
    assert rms_norm(x.bfloat16(), weight, 1e-5).dtype == torch.bfloat16


def test_a_norm_in_parts_equals_the_whole():
    x, weight = torch.randn(4, 36), torch.randn(36)
    squares = sum_of_squares(x[:, :12]) + sum_of_squares(x[:, 12:])
    parts = [scale_by_rms(x[:, part], squares / 36, weight[part], 1e-6) for part in (slice(0, 12), slice(12, 36))]
    torch.testing.assert_close(torch.cat(parts, -1), rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("rotary_dim", [12, 8])
def test_rotation_turns_pairs_and_passes_the_rest(rotary_dim):
    qkv = torch.randn(5, 7, 12)
    angles = torch.randn(5, rotary_dim // 2)
    before = qkv.clone()
    rotate_(qkv[:, :4], angles.cos(), angles.sin())
    half = rotary_dim // 2
    pairs = torch.complex(before[:, :4, :half], before[:, :4, half:rotary_dim])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(qkv[:, :4, :half], turned.real)
    torch.testing.assert_close(qkv[:, :4, half:rotary_dim], turned.imag)
    assert torch.equal(qkv[:, :4, rotary_dim:], before[:, :4, rotary_dim:])
    assert torch.equal(qkv[:, 4:], before[:, 4:])


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", functional.silu),
        ("gelu", functional.gelu),
        ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
    ],
)
def test_gated_activation(name, function):
    gate, up = torch.randn(3, 14), torch.randn(3, 14)
    torch.testing.assert_close(gated_activation(torch.cat((gate, up), -1), name), function(gate) * up)


@pytest.mark.parametrize("rows", [1, 3, 32, 65])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_equal_plain_ones(rows, biased, dtype):
    if not can_pack(CPU, dtype):
        pytest.skip("this torch build has no packed product for the dtype")
    x, weight = torch.randn(rows, 40).to(dtype), torch.randn(131, 40).to(dtype)
    bias = torch.randn(131).to(dtype) if biased else None
    expected = PlainLinear(weight.double(), None if bias is None else bias.double())(x.double())
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    for linear in (PackedLinear(weight, bias), PlainLinear(weight, bias)):
        torch.testing.assert_close(linear(x).double(), expected, rtol=0, atol=tolerance)
        assert linear(x).dtype == dtype
        assert linear.float32(x).dtype == torch.float32
        torch.testing.assert_close(linear.float32(x).double(), expected, rtol=0, atol=tolerance)
        hidden = torch.ones(rows, 131, dtype=dtype)
        linear.add_to(hidden, x, -0.5)
        torch.testing.assert_close(hidden.double(), 1 - 0.5 * expected, rtol=0, atol=tolerance)


def test_rows_of_an_embedding():
    weight, rows = torch.randn(9, 5), torch.tensor([8, 0, 8, 3])
    kernels = TorchKernels(CPU, torch.float32)
    embedding = kernels.tied_linear(weight)
    assert torch.equal(kernels.embed(embedding, rows, 1.0), weight[rows])
    assert torch.equal(kernels.embed(embedding, rows, 3.0), weight[rows] * 3)
    with pytest.raises(IndexError):
        kernels.embed(embedding, torch.tensor([9]), 1.0)


def test_only_the_cpu_packs():
    assert not can_pack(torch.device("cuda"), torch.float32)
    assert not can_pack(CPU, torch.float16)
    kernels = load_kernels(CPU, torch.float16)
    assert isinstance(kernels, TorchKernels)
    assert type(kernels.linear(torch.ones(1, 1))) is PlainLinear


def test_torch_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(CHOICE, "torch")
    assert isinstance(load_kernels(CPU, torch.float32), TorchKernels)


@pytest.mark.parametrize("normalize", [True, False])
def test_routing(normalize):
    logits = torch.randn(6, 5)
    weights, ids = route(logits, 2, normalize)
    probabilities = torch.softmax(logits, -1)
    assert torch.equal(ids, probabilities.argsort(descending=True)[:, :2])
    expected = probabilities.gather(1, ids)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True) if normalize else expected)


@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_are_summed_with_their_weights(tokens):
    x = torch.randn(tokens, 10)
    gate_up, down = torch.randn(4, 12, 10), torch.randn(4, 10, 6)
    ids = torch.tensor([[2, 0], [0, 3], [2, 3]]).repeat(3, 1)[:tokens]  # expert 1 has no token
    weights = torch.rand(tokens, 2)
    kernels = TorchKernels(CPU, torch.float32)
    gated = [kernels.gated_linear(expert, None, "silu") for expert in gate_up]
    out = run_experts(x, weights, ids, gated, [kernels.linear(expert) for expert in down])
    for token in range(tokens):
        expected = torch.zeros(10)
        for weight, expert in zip(weights[token], ids[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected += weight * (down[expert] @ (functional.silu(gate) * up))
        torch.testing.assert_close(out[token], expected)
