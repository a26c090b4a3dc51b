import pytest
import torch

from raytroupe.kernels.activation import gated_activation
from raytroupe.kernels.gpu.linear import LinearConfig, TritonGatedLinear, TritonLinear, candidates
from raytroupe.kernels.linear import PlainLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_ROWS = 64


def config(split=1, max_rows=ALL_ROWS):
    return LinearConfig(block_n=32, block_k=32, split_k=split, warps=4, stages=2, max_rows=max_rows)


def matrices(generator, rows, outputs, inputs, dtype):
    """Rows, which are parts of longer ones, and a weight that keeps results near 1."""
    x = torch.randn(rows, inputs + 8, generator=generator).to(dtype)[:, 3 : inputs + 3]
    weight = torch.randn(outputs, inputs, generator=generator).mul_(inputs**-0.5).to(dtype)
    return x, weight, torch.randn(outputs, generator=generator).to(dtype)


@pytest.mark.launches("few_rows_linear_kernel")
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [(1, 1, 64), (1, 96, 70), (5, 33, 128), (17, 64, 200), (33, 40, 31)],
)
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_is_the_reference(rows, outputs, inputs, split, dtype, generator):
    x, weight, bias = matrices(generator, rows, outputs, inputs, dtype)
    for given in (None, bias):
        linear, reference = TritonLinear(weight, given, config(split)), PlainLinear(weight, given)
        torch.testing.assert_close(linear(x), reference(x))
        exact = x.double() @ weight.double().t() + (0 if given is None else given.double())
        y = linear.float32(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.launches("few_rows_linear_kernel")
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("alpha", [1.0, 0.22])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_is_added_where_it_belongs(split, alpha, dtype, generator):
    x, weight, bias = matrices(generator, 4, 50, 96, dtype)
    whole = torch.randn(4, 60, generator=generator).to(dtype)
    before, hidden = whole.clone(), whole[:, 6:56]
    exact = hidden.double() + alpha * (x.double() @ weight.double().t() + bias.double())
    TritonLinear(weight, bias, config(split)).add_to(hidden, x, alpha)
    torch.testing.assert_close(hidden, exact.to(dtype))
    assert torch.equal(whole[:, :6], before[:, :6])
    assert torch.equal(whole[:, 56:], before[:, 56:])


@pytest.mark.launches("few_rows_linear_kernel")
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_product_is_the_reference(split, activation, dtype, generator):
    for rows, width, inputs in ((1, 40, 70), (6, 32, 128)):
        x, weight, bias = matrices(generator, rows, 2 * width, inputs, dtype)
        for given in (None, bias):
            expected = gated_activation(PlainLinear(weight, given)(x), activation)
            out = TritonGatedLinear(weight, given, activation, config(split))(x)
            # A product on the other side of a rounding border is one step of its dtype away.
            step = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
            torch.testing.assert_close(out, expected, rtol=step, atol=step)


@pytest.mark.launches("few_rows_linear_kernel")
def test_a_split_product_can_be_repeated_with_the_same_bits_and_other_numbers_of_rows(generator):
    x, weight, _ = matrices(generator, 16, 70, 512, torch.bfloat16)
    linear = TritonLinear(weight, None, config(split=5))
    first = linear.float32(x)
    assert torch.equal(first[:3], linear.float32(x[:3]))
    assert torch.equal(first, linear.float32(x))


@pytest.mark.launches("few_rows_linear_kernel")
def test_more_splits_than_blocks_are_not_used(generator):
    x, weight, _ = matrices(generator, 2, 8, 40, torch.float32)
    torch.testing.assert_close(TritonLinear(weight, None, config(split=9))(x), PlainLinear(weight)(x))


@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_are_the_librarys(bias, generator, monkeypatch):
    def forbidden(*arguments):
        raise AssertionError("few rows' kernel was launched")

    monkeypatch.setattr("raytroupe.kernels.gpu.linear._FewRows.__call__", forbidden)
    x, weight, given = matrices(generator, 3, 24, 40, torch.bfloat16)
    given = given if bias else None
    linear, reference = TritonLinear(weight, given, config(max_rows=2)), PlainLinear(weight, given)
    assert torch.equal(linear(x), reference(x))
    assert torch.equal(linear.float32(x), reference.float32(x))
    hidden = torch.randn(3, 24, generator=generator).bfloat16()
    expected = hidden.clone()
    linear.add_to(hidden, x, 0.5)
    reference.add_to(expected, x, 0.5)
    torch.testing.assert_close(hidden, expected, rtol=0.02, atol=0.02)  # the reference rounds the product too
    gated = TritonGatedLinear(weight, given, "silu", config(max_rows=2))
    torch.testing.assert_close(gated(x), gated_activation(reference(x), "silu"))


@pytest.mark.launches("few_rows_linear_kernel")
def test_configuration_comes_from_the_table(generator):
    x, weight, _ = matrices(generator, 2, 48, 64, torch.float32)
    torch.testing.assert_close(TritonLinear(weight)(x), PlainLinear(weight)(x))
    gated = TritonGatedLinear(weight, None, "silu")
    torch.testing.assert_close(gated(x), gated_activation(PlainLinear(weight)(x), "silu"))


@pytest.mark.launches("few_rows_linear_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_every_candidate_computes_the_product(dtype, gated, generator):
    x, weight, _ = matrices(generator, 1, 64, 512, dtype)
    found = candidates(32 if gated else 64, 512, dtype, gated=gated, processors=2)
    assert len(set(found)) == len(found) > 3
    assert any(candidate.split_k > 1 for candidate in found)
    for candidate in found:
        if gated:
            out = TritonGatedLinear(weight, None, "silu", candidate)(x)
            torch.testing.assert_close(out, gated_activation(PlainLinear(weight)(x), "silu"), rtol=2e-2, atol=2e-2)
        else:
            torch.testing.assert_close(TritonLinear(weight, None, candidate)(x), PlainLinear(weight)(x))
