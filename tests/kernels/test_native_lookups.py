"""Embeddings, rotations, gathered norms and argmax as compiled: the same as torch's, row by row."""

import math

import pytest
import torch
from guarded import SENTINEL, Guarded, surrounded_by_nan
from paged_batch import CPU

from raytroupe.kernels.linear import PlainLinear
from raytroupe.kernels.native_kernels import NativeKernels
from raytroupe.kernels.torch_kernels import TorchKernels

THREADS = (1, 3)

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@dtypes
@pytest.mark.parametrize("vocabulary", [1, 15, 17, 64, 65, 131, 192, 200])
def test_an_embedding_packed_or_not_gives_the_rows_of_the_weight(instruction_set, dtype, vocabulary, generator):
    kernels = NativeKernels()
    for width in (1, 2, 31, 40, 65):
        weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
        for embedding in (kernels.tied_linear(weight.clone()), PlainLinear(weight)):
            for rows in (0, 1, 6, 90):
                tokens = torch.randint(0, vocabulary, (rows,), generator=generator)
                tokens[:1] = vocabulary - 1
                for threads in THREADS:
                    torch.set_num_threads(threads)
                    assert torch.equal(kernels.embed(embedding, tokens, 1.0), weight[tokens])
                    out = Guarded(rows, width, dtype, margin=SENTINEL, inside=math.nan)
                    assert kernels.embed(embedding, tokens, 55.5, out.inside) is out.inside
                    assert torch.equal(out.inside, weight[tokens] * 55.5)
                    out.assert_margins()


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_cosines_and_sines_of_positions_far_out(instruction_set, factor, generator):
    kernels, plain = NativeKernels(), TorchKernels(CPU, torch.float32)
    for width in (1, 6, 64):
        frequencies = 1.0 / 500_000.0 ** torch.rand(width, generator=generator)
        frequencies[0] = 1.0
        positions = torch.randint(0, 131_072, (70,), generator=generator)
        positions[:3] = torch.tensor([0, 1, 131_071])
        angles = (positions.float()[:, None] * frequencies).double()  # the angle itself is float32, as transformers'
        for rows in (0, 1, 70):
            buffers = [torch.full((rows + 2, width), SENTINEL) for _ in range(2)]
            out = buffers[0][:rows], buffers[1][:rows]
            for threads in THREADS:
                torch.set_num_threads(threads)
                fresh = kernels.rotation(positions[:rows], frequencies, factor)
                kernels.rotation(positions[:rows], frequencies, factor, out)
                theirs = plain.rotation(positions[:rows], frequencies, factor)
                for mine, written, buffer, reference, exact in zip(
                    fresh, out, buffers, theirs, (angles.cos(), angles.sin()), strict=True
                ):
                    assert torch.equal(mine, written)
                    assert (buffer[rows:] == SENTINEL).all()
                    torch.testing.assert_close(mine.double(), exact[:rows] * factor, rtol=0, atol=3e-7)
                    torch.testing.assert_close(mine, reference, rtol=0, atol=5e-7)


def test_frequencies_of_their_own_for_every_position(generator):
    frequencies, positions = torch.rand(5, 8, generator=generator), torch.arange(5) * 1000
    expected = TorchKernels(CPU, torch.float32).rotation(positions, frequencies, 0.7)
    assert all(map(torch.equal, NativeKernels().rotation(positions, frequencies, 0.7), expected))


@dtypes
def test_a_norm_of_chosen_rows(instruction_set, dtype, generator):
    kernels = NativeKernels()
    for width in (1, 40, 65):
        x = surrounded_by_nan(torch.randn(30, width, generator=generator).to(dtype))
        weight = torch.randn(width, generator=generator)
        everything = kernels.rms_norm(x, weight, 1e-5)
        for rows in ([], [29], [5, 0, 5, 29, 7], list(range(30))[::-1]):
            chosen = torch.tensor(rows, dtype=torch.int64)
            assert torch.equal(kernels.rms_norm(x, weight, 1e-5, rows=chosen), everything[chosen])


def assert_argmax(logits):
    kernels = NativeKernels()
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert torch.equal(kernels.argmax(logits), logits.argmax(-1))


@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 31, 32, 33, 131, 5003])
def test_the_largest_and_of_equals_the_first(instruction_set, vocabulary, generator):
    random = torch.randn(40, vocabulary, generator=generator)
    assert_argmax(surrounded_by_nan(random))
    assert_argmax(surrounded_by_nan(random.mul(2).round()))  # few different numbers
    assert_argmax(torch.zeros(3, vocabulary))
    assert_argmax(torch.full((3, vocabulary), -torch.inf))
    assert_argmax(random.abs().neg())
    some = random.masked_fill(torch.rand(random.shape, generator=generator) < 0.9, -torch.inf)
    assert_argmax(some)
    assert_argmax(some.neg())
    places = torch.arange(vocabulary).clamp(max=300)
    peaks = torch.full((len(places), vocabulary), -3.0)
    peaks[torch.arange(len(places)), places] = 0.0
    assert_argmax(peaks)
    assert NativeKernels().argmax(random[:0]).shape == (0,)


@pytest.mark.parametrize("vocabulary", [1, 16, 17, 31, 131])
def test_the_first_nan_comes_before_all(instruction_set, vocabulary, generator):
    random = torch.randn(vocabulary, vocabulary, generator=generator)
    one, two = random.clone(), random.clone()
    one.fill_diagonal_(torch.nan)
    assert torch.equal(NativeKernels().argmax(one), torch.arange(vocabulary))
    two.fill_diagonal_(torch.nan)
    two[:, vocabulary // 2] = torch.nan
    two[:, 0] = torch.inf
    assert_argmax(two)
    assert_argmax(torch.full((2, vocabulary), torch.nan))
