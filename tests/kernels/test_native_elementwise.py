"""The compiled norms, rotations, activations and sums against float64, and what they leave alone."""

import pytest
import torch
from guarded import SENTINEL, Guarded, GuardedKernels, surrounded_by_nan
from torch.nn import functional

from raytroupe.kernels.attention_metadata import AttentionMetadata
from raytroupe.kernels.native_kernels import NativeKernels
from raytroupe.kernels.native_library import ACTIVATIONS, GatedActivation, Kind, OperationList, Step

WIDTHS = (1, 7, 15, 16, 17, 40, 63, 64, 65, 200, 1031)
ROWS = (1, 5, 70)
THREADS = (1, 2, 5)
FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def normal(shape, dtype, generator):
    return torch.randn(shape, generator=generator).to(dtype)


def assert_rounded(actual, expected, bound):
    """`expected` float64 up to `bound` and, in bfloat16, to one of the two numbers beside it."""
    error = (actual.double() - expected).abs()
    if actual.dtype == torch.bfloat16:
        spacing = 2.0 ** (torch.frexp(expected.abs().clamp(min=2.0**-126)).exponent - 8).double()
        bound = bound + spacing
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the allowed error"


def metadata(slots):
    """A step that writes to `slots` and attends to nothing."""
    none = torch.zeros(1, dtype=torch.int32)
    return AttentionMetadata(slots, slots, none, none, none[None], 0, [], [])


@dtypes
def test_rms_norm(instruction_set, dtype, generator):
    kernels = GuardedKernels()
    for width in WIDTHS:
        x = surrounded_by_nan(normal((max(ROWS), width), dtype, generator) * 3)
        x[2:4] *= 1e-3
        weight = normal((width,), torch.float32, generator)
        wide = x.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        for rows in ROWS:
            before = x.clone()
            out = kernels.rms_norm(x[:rows], weight, 1e-5)
            assert_rounded(out, expected[:rows], 1e-6 * expected[:rows].abs())
            assert torch.equal(x, before)
            kernels.check()
        place = Guarded(70, width, dtype, margin=SENTINEL, inside=0.0)
        place.inside.copy_(x)
        assert kernels.rms_norm(place.inside, weight, 1e-5, in_place=True) is place.inside
        assert torch.equal(place.inside, kernels.rms_norm(x, weight, 1e-5))
        place.assert_margins()
        kernels.check()


@dtypes
def test_a_norm_of_zeros_and_what_breaks_a_row(instruction_set, dtype, generator):
    x, weight = normal((6, 33), dtype, generator), torch.ones(33)
    x[0], x[2, 5], x[4, 32] = 0.0, torch.nan, torch.inf
    out = NativeKernels().rms_norm(x, weight, 1e-6)
    assert not out[0].any()
    assert out[2].isnan().all()
    assert out[4, 32].isnan()
    expected = functional.rms_norm(x[[1, 3, 5]].double(), (33,), eps=1e-6)
    assert_rounded(out[[1, 3, 5]], expected, 1e-6 * expected.abs())


def step_of(kernels, generator, *, dtype, heads, kv_heads, head_dim, rotary_dim, rows, normed):
    """Random inputs of `rotate_and_store`, slots in any order."""
    blocks, block_size = 20, 8
    angles = torch.randn(rows, rotary_dim // 2, generator=generator) * 100
    norms = tuple(torch.randn(head_dim, generator=generator) + 1 for _ in range(2)) if normed else None
    slots = torch.randperm(blocks * block_size, generator=generator)[:rows]
    caches = [torch.full((kv_heads, blocks, block_size, head_dim), SENTINEL, dtype=dtype) for _ in range(2)]
    qkv = normal((rows, heads + 2 * kv_heads, head_dim), dtype, generator)
    return qkv, (angles.cos(), angles.sin()), caches, kernels.plan(metadata(slots), block_size), norms, slots


def rotated(x, rotation, norm, eps):
    """[T, heads, head_dim] normalised, rounded to its dtype, and rotated in float64; and the sizes that went in."""
    wide = x.double()
    if norm is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
        wide = wide.to(x.dtype).double()
    cos, sin = (part.double()[:, None] for part in rotation)
    half = cos.shape[-1]
    a, b, rest = wide.split((half, half, wide.shape[-1] - 2 * half), -1)
    sizes = torch.cat((a.abs() + b.abs(), a.abs() + b.abs(), rest.abs()), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1), sizes


@dtypes
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(12, 12), (64, 64), (128, 128), (20, 10), (33, 26), (80, 2)])
def test_rotated_queries_and_stored_keys_and_values(instruction_set, dtype, normed, head_dim, rotary_dim, generator):
    kernels, heads, kv_heads, eps = NativeKernels(), 6, 2, 1e-5
    for rows in ROWS:
        qkv, rotation, caches, plan, norms, slots = step_of(
            kernels, generator, dtype=dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim,
            rows=rows, normed=normed,
        )  # fmt: skip
        query, keys, values = qkv.clone().split((heads, kv_heads, kv_heads), 1)
        out = kernels.rotate_and_store(qkv, rotation, *caches, plan, norms=norms, eps=eps)
        assert out.shape == (rows, heads, head_dim)
        assert out.data_ptr() == qkv.data_ptr()
        stored_keys, stored_values = (cache.flatten(1, 2)[:, slots].transpose(0, 1) for cache in caches)
        assert torch.equal(stored_values, values)
        for actual, x, norm in ((out, query, norms and norms[0]), (stored_keys, keys, norms and norms[1])):
            expected, sizes = rotated(x, rotation, norm, eps)
            # A norm may round to the other side, which is 2^-8 of what went in.
            slack = 2**-7 if normed and dtype == torch.bfloat16 else 1e-6
            assert_rounded(actual, expected, slack * sizes)
        for cache in caches:
            cache.flatten(1, 2)[:, slots] = SENTINEL
            assert (cache == SENTINEL).all(), "a slot was written that is not the step's"


@dtypes
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_nothing_but_finite_numbers_is_stored(instruction_set, dtype, broken, generator):
    kernels = NativeKernels()
    qkv, rotation, caches, plan, _, slots = step_of(
        kernels, generator, dtype=dtype, heads=2, kv_heads=1, head_dim=20, rotary_dim=12, rows=5, normed=False
    )
    values = qkv[:, 3].clone()
    qkv[1, 2, 4] = qkv[2, 2, 19] = qkv[3, 3, 7] = broken
    kernels.rotate_and_store(qkv, rotation, *caches, plan, norms=None, eps=1e-5)
    stored_keys, stored_values = (cache.flatten(1, 2)[0, slots] for cache in caches)
    assert stored_keys.isfinite().all()
    assert stored_values.isfinite().all()
    expected = torch.nan_to_num(torch.tensor(broken, dtype=dtype))
    assert stored_keys[2, 19] == expected  # not rotated
    assert stored_values[3, 7] == expected
    stored_values[3, 7] = values[3, 7]
    assert torch.equal(stored_values, values)


def activate(x, activation):
    """The operation that stands for itself; products apply the same function to their sums."""
    rows, width = len(x), x.shape[1] // 2
    out = Guarded(rows, width, x.dtype, margin=SENTINEL, inside=torch.nan)
    operation = GatedActivation(
        Kind.GATED_ACTIVATION,
        x.dtype == torch.bfloat16,
        width,
        ACTIVATIONS[activation],
        x.data_ptr(),
        out.inside.data_ptr(),
        x.stride(0),
        out.inside.stride(0),
    )
    OperationList([operation]).run(Step(rows=rows, threads=torch.get_num_threads()))
    out.assert_margins()
    return out.inside


@dtypes
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_gated_activations(instruction_set, dtype, activation, generator):
    for width in WIDTHS:
        for rows in ROWS:
            x = surrounded_by_nan(normal((rows, 2 * width), dtype, generator) * 4)
            gate, up = x.double().chunk(2, 1)
            # 1 + erf and 1 + tanh cancel, in torch as well.
            bound = 2e-6 * (FUNCTIONS[activation](gate) * up).abs() + 2e-7 * (gate * up).abs()
            assert_rounded(activate(x, activation), FUNCTIONS[activation](gate) * up, bound)


@dtypes
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations_far_out_vanish_or_pass_and_nan_stays(instruction_set, dtype, activation):
    gate = torch.tensor([-3e38, -1e30, -1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4, 1e30, 3e38, torch.inf])
    x = torch.cat((gate, torch.ones_like(gate)))[None].to(dtype)
    out = activate(x, activation)[0]
    assert torch.equal(out[5:], x[0, 5 : len(gate)])
    # Of the largest numbers a part of 1e-38 is left, which is their size.
    assert (out[2:5].abs() <= 1e-30).all()
    assert out.isnan().sum() == 0
    x[0, 3] = torch.nan
    out = activate(x, activation)[0]
    assert out[3].isnan()
    assert out.isnan().sum() == 1


@dtypes
@pytest.mark.parametrize("alpha", [1.0, 0.22, -3.0])
def test_adding_to_the_residual_stream(instruction_set, dtype, alpha, generator):
    kernels = NativeKernels()
    for width in WIDTHS:
        for rows in ROWS:
            x = surrounded_by_nan(normal((rows, width), dtype, generator))
            hidden = Guarded(rows, width, dtype, margin=SENTINEL, inside=0.0)
            before = hidden.inside.copy_(normal((rows, width), dtype, generator)).double()
            kernels.add_(hidden.inside, x, alpha)
            sizes = before.abs() + abs(alpha) * x.double().abs()
            assert_rounded(hidden.inside, before + alpha * x.double(), 2**-22 * sizes)
            hidden.assert_margins()


@dtypes
def test_the_number_of_threads_changes_no_bit(instruction_set, dtype, generator):
    kernels = NativeKernels()
    weight = normal((65,), torch.float32, generator)
    for rows in (1, 3, 70):
        x, hidden = normal((rows, 130), dtype, generator), normal((rows, 65), dtype, generator)
        qkv, rotation, caches, plan, norms, _ = step_of(
            kernels, generator, dtype=dtype, heads=4, kv_heads=2, head_dim=20, rotary_dim=12, rows=rows, normed=True
        )
        results = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            plan = kernels.plan(plan.metadata, 8)
            summed, mine, copies = hidden.clone(), qkv.clone(), [cache.clone() for cache in caches]
            kernels.add_(summed, x[:, 65:], 0.3)
            query = kernels.rotate_and_store(mine, rotation, *copies, plan, norms=norms, eps=1e-6)
            results.append(
                (kernels.rms_norm(x[:, :65], weight, 1e-6), summed, query, *copies, activate(x, "gelu_tanh"))
            )
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))
