import pytest
import torch
from quantised_samples import exact_product, random_weight

from raytroupe.kernels.activation import gated_activation
from raytroupe.kernels.gpu import quantised_layout
from raytroupe.kernels.gpu.quantised_layout import Workspace, pack
from raytroupe.kernels.gpu.quantised_linear import QuantisedConfig, QuantisedProduct, candidates
from raytroupe.kernels.gpu.quantised_operations import TritonQuantisedLinear, new_product
from raytroupe.kernels.quantised_linear import QuantisedLinear

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_STEP = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""What rounding to a dtype changes at most, relative to the number."""
WEIGHTS = [
    {"outputs": 33, "inputs": 256, "bits": 4, "group": 128},
    {"outputs": 24, "inputs": 320, "bits": 4, "group": 64, "zeros": True},
    {"outputs": 20, "inputs": 160, "bits": 4, "group": 32, "zeros": True, "scale_dtype": torch.bfloat16},
    {"outputs": 7, "inputs": 96, "bits": 4, "group": 16},
    {"outputs": 40, "inputs": 70, "bits": 4, "group": 1000, "zeros": True},
    {"outputs": 24, "inputs": 200, "bits": 8, "group": 64, "zeros": True},
    {"outputs": 17, "inputs": 256, "bits": 8, "group": 128, "scale_dtype": torch.float16},
    {"outputs": 24, "inputs": 256, "bits": 8, "group": 128, "floats": True},
    {"outputs": 24, "inputs": 130, "bits": 8, "group": 1000, "floats": True},
]


def config(split=1, max_rows=64, block_n=16):
    return QuantisedConfig(block_n=block_n, split_k=split, warps=4, stages=2, max_rows=max_rows)


def linear_of(weight, dtype, bias=None, split=1, max_rows=64, activation=None):
    product = new_product(weight, bias, activation, Workspace(CPU, dtype), float8=True, config=config(split, max_rows))
    return TritonQuantisedLinear(product)


def rows_of(generator, rows, inputs, dtype):
    """Rows that are parts of longer ones."""
    return torch.randn(rows, inputs + 8, generator=generator).to(dtype)[:, 3 : inputs + 3]


@pytest.mark.launches("few_rows_quantised_kernel")
@pytest.mark.parametrize("options", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_few_rows_is_exact_but_for_its_own_rounding(options, dtype, generator):
    weight = random_weight(generator, **options)
    bias = torch.randn(len(weight), generator=generator).to(dtype)
    for rows, split, given in ((1, 2, bias), (5, 1, None)):
        x = rows_of(generator, rows, weight.shape[1], dtype)
        linear = linear_of(weight, dtype, given, split)
        exact = exact_product(weight, x, given)
        wide = linear.float32(x)
        assert wide.dtype == torch.float32
        torch.testing.assert_close(wide, exact.float(), rtol=2e-5, atol=2e-5)
        # Against the exact numbers: rounded ones may lie on the other side of a border, a whole step away.
        torch.testing.assert_close(linear(x).double(), exact, rtol=HALF_STEP[dtype] + 2e-5, atol=2e-5)


@pytest.mark.launches("few_rows_quantised_kernel")
@pytest.mark.parametrize("rows", [33, 64])
def test_more_than_one_tile_of_rows(rows, generator):
    weight = random_weight(generator, 40, 256, group=128)
    x = rows_of(generator, rows, 256, torch.float32)
    for split in (1, 2):
        y = linear_of(weight, torch.float32, split=split)(x)
        torch.testing.assert_close(y, exact_product(weight, x).float(), rtol=2e-5, atol=2e-5)


@pytest.mark.launches("few_rows_quantised_kernel")
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("max_rows", [64, 0])
@pytest.mark.parametrize("biased", [False, True])
def test_product_is_added_where_it_belongs(split, max_rows, biased, generator, monkeypatch):
    monkeypatch.setattr(quantised_layout, "WORKSPACE_BYTES", 20 * 256 * 4)
    weight = random_weight(generator, 50, 256, group=128)
    bias = torch.randn(50, generator=generator) if biased else None
    x = rows_of(generator, 4, 256, torch.float32)
    whole = torch.randn(4, 60, generator=generator)
    before, hidden = whole.clone(), whole[:, 6:56]
    exact = hidden.double() + 0.22 * exact_product(weight, x, bias)
    linear_of(weight, torch.float32, bias, split, max_rows).add_to(hidden, x, 0.22)
    torch.testing.assert_close(hidden, exact.float(), rtol=2e-5, atol=2e-5)
    assert torch.equal(whole[:, :6], before[:, :6])
    assert torch.equal(whole[:, 56:], before[:, 56:])
    if max_rows == 0:
        linear_of(weight, torch.float32)(x)  # the kernel that the test is marked with


@pytest.mark.launches("few_rows_quantised_kernel", "dequantise_kernel")
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_product_is_the_reference(activation, dtype, generator):
    weight = random_weight(generator, 2 * 24, 256, group=128, zeros=True)
    bias = torch.randn(48, generator=generator).to(dtype)
    x = rows_of(generator, 3, 256, dtype)
    expected = gated_activation(QuantisedLinear(weight, bias)(x), activation)
    for split, max_rows in ((1, 64), (2, 64), (1, 0)):
        out = linear_of(weight, dtype, bias, split, max_rows, activation)(x)
        # A factor on the other side of a rounding border is one step of its dtype away, and so may the weight be.
        step = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out, expected, rtol=step, atol=step)


@pytest.mark.launches("dequantise_kernel")
@pytest.mark.parametrize("options", [*WEIGHTS, {"outputs": 10, "inputs": 120, "bits": 4, "group": 24, "zeros": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expanded_weight_is_the_reference_in_every_piece(options, dtype, generator):
    weight = random_weight(generator, **options)
    packed = pack(weight)
    memory = torch.full((weight.shape[0] * weight.shape[1] + 5,), 9.0, dtype=dtype)
    expected = weight.dequantise(dtype)
    assert torch.equal(packed.dequantise(0, len(weight), memory), expected)
    assert (memory[-5:] == 9).all()
    assert torch.equal(packed.dequantise(3, 6, memory), expected[3:6])


@pytest.mark.launches("dequantise_kernel")
@pytest.mark.parametrize("biased", [False, True])
def test_many_rows_are_the_librarys_piece_by_piece(biased, generator, monkeypatch):
    monkeypatch.setattr(quantised_layout, "WORKSPACE_BYTES", 7 * 128 * 4)
    weight = random_weight(generator, 20, 128, group=64)
    bias = torch.randn(20, generator=generator) if biased else None
    x = rows_of(generator, 70, 128, torch.float32)
    workspace = Workspace(CPU, torch.float32)
    linear = TritonQuantisedLinear(new_product(weight, bias, None, workspace, float8=True, config=config()))
    assert len(workspace.memory) == 7 * 128
    exact = exact_product(weight, x, bias).float()
    torch.testing.assert_close(linear(x), exact, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(linear.float32(x), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.launches("dequantise_kernel")
def test_groups_that_no_matrix_unit_takes_are_expanded_for_few_rows_too(generator):
    weight = random_weight(generator, 10, 120, group=24, zeros=True)
    x = rows_of(generator, 2, 120, torch.float32)
    y = linear_of(weight, torch.float32)(x)
    torch.testing.assert_close(y, exact_product(weight, x).float(), rtol=2e-5, atol=2e-5)


@pytest.mark.launches("few_rows_quantised_kernel")
def test_columns_in_another_order_meet_their_inputs(generator):
    weight = random_weight(generator, 24, 128, group=32, ordered=True)
    for rows in (2, 70):
        x = rows_of(generator, rows, 128, torch.float32)
        y = linear_of(weight, torch.float32)(x)
        torch.testing.assert_close(y, exact_product(weight, x).float(), rtol=2e-5, atol=2e-5)


@pytest.mark.launches("few_rows_quantised_kernel", "round_activations_kernel")
@pytest.mark.parametrize(
    ("options", "float8"),
    [
        ({"bits": 4, "group": 32, "activations": torch.int8, "ordered": True}, True),
        ({"bits": 8, "group": 64, "activations": torch.int8, "zeros": True}, True),
        ({"bits": 8, "group": 64, "activations": torch.float8_e4m3fn, "floats": True}, False),
    ],
)
def test_activations_are_rounded_where_no_kernel_multiplies_in_eight_bits(options, float8, generator):
    weight = random_weight(generator, 24, 128, **options)
    x = rows_of(generator, 3, 128, torch.float32)
    product = new_product(weight, None, None, Workspace(CPU, torch.float32), float8=float8, config=config())
    assert torch.allclose(TritonQuantisedLinear(product)(x), QuantisedLinear(weight)(x), rtol=2e-5, atol=2e-5)


@pytest.mark.launches("few_rows_quantised_kernel")
def test_a_split_product_can_be_repeated_with_the_same_bits_and_other_numbers_of_rows(generator):
    weight = random_weight(generator, 40, 1024, group=128)
    x = rows_of(generator, 16, 1024, torch.bfloat16)
    linear = linear_of(weight, torch.bfloat16, split=4)
    first = linear.float32(x)
    assert torch.equal(first[:3], linear.float32(x[:3]))
    assert torch.equal(first, linear.float32(x))


@pytest.mark.launches("few_rows_quantised_kernel")
def test_a_broken_row_does_not_touch_the_others(generator):
    weight = random_weight(generator, 20, 256, group=128)
    x = rows_of(generator, 4, 256, torch.float32)
    linear = linear_of(weight, torch.float32)
    expected = linear(x)
    x[1, 5], x[3] = torch.nan, torch.inf
    y = linear(x)
    assert torch.equal(y[::2], expected[::2])
    assert y[1].isnan().all()


@pytest.mark.launches("few_rows_quantised_kernel")
@pytest.mark.parametrize("gated", [False, True])
def test_every_candidate_computes_the_product(gated, generator):
    weight = random_weight(generator, 64, 512, group=128)
    x = rows_of(generator, 1, 512, torch.float32)
    found = candidates(32 if gated else 64, 512, gated=gated, processors=2)
    assert len(set(found)) == len(found) > 3
    assert any(candidate.split_k > 1 for candidate in found)
    expected = QuantisedLinear(weight)(x)
    expected = gated_activation(expected, "silu") if gated else expected
    for candidate in found:
        out = torch.empty_like(expected)
        QuantisedProduct(pack(weight), None, "silu" if gated else None, Workspace(CPU, torch.float32), candidate)(
            x, out
        )
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def test_a_packed_weight_takes_no_more_memory_than_was_given(generator):
    for options in WEIGHTS:
        weight = random_weight(
            generator, options["outputs"], 256, **{k: v for k, v in options.items() if k not in ("outputs", "inputs")}
        )
        assert pack(weight).nbytes == weight.nbytes
