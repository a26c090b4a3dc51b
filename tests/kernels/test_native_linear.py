"""The compiled products: exact on integers, close to float64 on others, whatever the widths, batch and threads."""

import itertools

import pytest
import torch
from guarded import SENTINEL, Guarded, GuardedKernels, surrounded_by_nan
from torch.nn import functional

from raytroupe.kernels.native_kernels import NativeKernels

FEW_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
MANY_ROWS = (16, 33, 70, 400)  # 384 are one item's
IN_FEATURES = (1, 2, 31, 40, 1023, 3001)  # 3001 take four chunks in float32
OUT_FEATURES = (1, 15, 16, 17, 63, 64, 65, 129)
DTYPES = (torch.float32, torch.bfloat16)
THREADS = (1, 2, 3, 5, 16)
SHAPES = [(*features, FEW_ROWS) for features in itertools.product(IN_FEATURES, OUT_FEATURES)]
SHAPES += [(*features, MANY_ROWS) for features in ((31, 129), (1023, 17), (1023, 64), (3001, 33))]
"""(inputs, outputs, numbers of rows)"""
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def integers(shape, dtype, generator):
    """Small enough that all sums of products are exact in float32."""
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def normal(shape, dtype, generator):
    return torch.randn(shape, generator=generator).to(dtype)


def error_bound(sizes, in_features):
    """Of a float32 sum over `in_features` products with absolute values that add up to `sizes`: errors of rounding are
    random and independent, so they grow with the root."""
    return (8 + in_features**0.5) * 2**-24 * sizes


def assert_within(actual, expected, bound):
    """Up to `bound`, and, in bfloat16, rounding."""
    if actual.dtype == torch.bfloat16:
        bound = bound + expected.abs() * 2**-8
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the allowed error"


@dtypes
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "plain"])
def test_integers_give_the_exact_sum_and_nothing_is_touched_beside_it(instruction_set, dtype, biased, generator):
    kernels = GuardedKernels()
    for inputs, outputs, numbers_of_rows in SHAPES:
        x = surrounded_by_nan(integers((max(numbers_of_rows), inputs), dtype, generator))
        weight = integers((outputs, inputs), dtype, generator)
        bias = integers((outputs,), dtype, generator) if biased else None
        linear = kernels.linear(weight.clone(), bias)
        everything = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        for rows in numbers_of_rows:
            case, expected = f"{rows} rows, {inputs} → {outputs}", everything[:rows]
            result = linear(x[:rows])
            assert torch.equal(result, expected.to(dtype)), case
            exact = linear.float32(x[:rows])
            assert exact.dtype == torch.float32
            assert torch.equal(exact, expected.float()), case
            kernels.check()
            hidden = Guarded(rows, outputs, dtype, margin=SENTINEL, inside=3.0)
            linear.add_to(hidden.inside, x[:rows], -0.5)
            assert torch.equal(hidden.inside, (3 - 0.5 * expected).to(dtype)), case
            hidden.assert_margins()


@dtypes
def test_products_are_as_close_to_float64_as_float32_sums_are(instruction_set, dtype, generator):
    kernels = NativeKernels()
    for inputs, outputs, rows in itertools.product(IN_FEATURES, (17, 129), (1, 5, 20)):
        x, weight = normal((rows, inputs), dtype, generator), normal((outputs, inputs), dtype, generator)
        bias = normal((outputs,), dtype, generator)
        linear = kernels.linear(weight.clone(), bias)
        expected = x.double() @ weight.double().T + bias.double()
        bound = error_bound(x.double().abs() @ weight.double().T.abs() + bias.double().abs(), inputs)
        assert_within(linear(x), expected, bound)
        assert_within(linear.float32(x), expected, bound)
        before = normal((rows, outputs), dtype, generator)
        hidden = before.clone()
        linear.add_to(hidden, x, 0.7)
        assert_within(hidden, before.double() + 0.7 * expected, bound + before.double().abs() * 2**-22)


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_and_up_in_one_pass(instruction_set, dtype, activation, generator):
    kernels = GuardedKernels()
    for inputs, width in itertools.product((1, 31, 3001), OUT_FEATURES):
        x = surrounded_by_nan(normal((20, inputs), dtype, generator))
        weight = normal((2 * width, inputs), dtype, generator) / inputs**0.5
        bias = normal((2 * width,), dtype, generator) if width % 2 else None
        gated = kernels.gated_linear(weight.clone(), bias, activation)
        wide_bias = 0 if bias is None else bias.double()
        gate, up = (x.double() @ weight.double().T + wide_bias).chunk(2, 1)
        sizes = x.double().abs() @ weight.double().T.abs() + (0 if bias is None else bias.double().abs())
        of_gate, of_up = error_bound(sizes, inputs).chunk(2, 1)
        activated = ACTIVATIONS[activation](gate)
        bound = 1.2 * of_gate * up.abs() + of_up * activated.abs() + 2**-21 * gate.abs() * up.abs() + 2**-40
        for rows in (1, 2, 9, 20):
            assert_within(gated(x[:rows]), (activated * up)[:rows], bound[:rows])
            kernels.check()


@dtypes
def test_no_rows_are_nothing_to_do(instruction_set, dtype):
    kernels = NativeKernels()
    assert kernels.linear(torch.ones(20, 7, dtype=dtype))(torch.ones(0, 7, dtype=dtype)).shape == (0, 20)
    gated = kernels.gated_linear(torch.ones(20, 7, dtype=dtype), None, "silu")
    assert gated(torch.ones(0, 7, dtype=dtype)).shape == (0, 10)


@dtypes
@pytest.mark.parametrize(("inputs", "outputs"), [(31, 129), (1023, 15), (3001, 64)])
def test_the_number_of_threads_changes_no_bit(instruction_set, dtype, inputs, outputs, generator):
    kernels = NativeKernels()
    most = 400 if inputs == 31 else 20
    x = normal((most, inputs), dtype, generator)
    linear = kernels.linear(normal((outputs, inputs), dtype, generator))
    gated = kernels.gated_linear(normal((2 * outputs, inputs), dtype, generator), None, "silu")
    for rows in (1, 7, most):
        results = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            hidden = torch.ones(rows, outputs, dtype=dtype)
            linear.add_to(hidden, x[:rows], 0.3)
            results.append((linear(x[:rows]), linear.float32(x[:rows]).clone(), gated(x[:rows]), hidden))
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


@dtypes
@pytest.mark.parametrize(("inputs", "outputs"), [(31, 129), (1023, 15), (3001, 33)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(instruction_set, dtype, inputs, outputs, generator):
    kernels = NativeKernels()
    most = 70 if inputs == 3001 else 400
    x = normal((most, inputs), dtype, generator)
    bias = normal((outputs,), dtype, generator)
    linear = kernels.linear(normal((outputs, inputs), dtype, generator), bias)
    gated = kernels.gated_linear(normal((2 * outputs, inputs), dtype, generator), None, "gelu_tanh")

    def results(x):
        hidden = torch.ones(len(x), outputs, dtype=dtype)
        linear.add_to(hidden, x, 0.3)
        return linear(x), linear.float32(x).clone(), gated(x), hidden

    whole = results(x)
    for rows in FEW_ROWS + MANY_ROWS[:3]:
        assert all(torch.equal(part, all_rows[:rows]) for part, all_rows in zip(results(x[:rows]), whole, strict=True))
    for row in (0, 1, most // 2, most - 1):
        alone = results(x[row : row + 1])
        assert all(torch.equal(part[0], all_rows[row]) for part, all_rows in zip(alone, whole, strict=True))
    order = torch.randperm(most, generator=generator)
    shuffled = results(x[order])
    assert all(torch.equal(part, all_rows[order]) for part, all_rows in zip(shuffled, whole, strict=True))


@dtypes
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("outputs", [33, 129])
def test_what_breaks_one_row_stays_in_it(instruction_set, dtype, broken, outputs, generator):
    kernels = NativeKernels()
    x = normal((9, 1023), dtype, generator)
    linear = kernels.linear(normal((outputs, 1023), dtype, generator))
    gated = kernels.gated_linear(normal((2 * outputs, 1023), dtype, generator), None, "silu")
    before = linear(x), gated(x)
    x[4] = broken
    after = linear(x), gated(x)
    others = torch.arange(9) != 4
    for was, now in zip(before, after, strict=True):
        assert torch.equal(now[others], was[others])
    assert not after[0][4].isfinite().any()
    if broken != broken:
        assert after[1][4].isnan().all()


@dtypes
@pytest.mark.parametrize("outputs", [5, 64, 131])
def test_rows_of_a_tied_weight_are_those_that_were_given(instruction_set, dtype, outputs, generator):
    weight = normal((outputs, 31), dtype, generator)
    kernels = NativeKernels(dtype)
    embedding = kernels.tied_linear(weight.clone())
    rows = torch.randint(0, outputs, (40,), generator=generator)
    assert torch.equal(kernels.embed(embedding, rows, 1.0), weight[rows])
    assert kernels.embed(embedding, rows[:0], 1.0).shape == (0, 31)


def test_what_the_weights_have_shrunk_by_is_counted_with_all_that_fills_groups():
    for compress in (False, True):
        kernels = NativeKernels(torch.bfloat16, compress=compress)
        given = [torch.randn(shape).bfloat16() for shape in ((100, 300), (64, 512), (150, 70))]
        linears = [kernels.linear(given[0].clone()), kernels.tied_linear(given[1].clone())]
        gated = kernels.gated_linear(given[2].clone(), None, "silu")
        held = sum(linear.weight.data.nbytes for linear in linears) + gated._weight.data.nbytes
        assert kernels.saved_bytes == sum(weight.nbytes for weight in given) - held
