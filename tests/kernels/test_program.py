"""A recorded program does what its kernels do when they are called one by one, for steps of any size."""

import itertools

import pytest
import torch
from paged_batch import CPU, BlockTables

from raytroupe.kernels import native_library
from raytroupe.kernels.native_kernels import NativeKernels
from raytroupe.kernels.torch_kernels import TorchKernels

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, BLOCK, MAX_ROWS = 40, 4, 2, 12, 56, 8, 32
SENTINEL = -12345.0
STEPS = [[(0, 0, 20), (1, 0, 9)], [(0, 20, 1), (1, 9, 1)], [(0, 21, 1)], [(1, 10, 1), (0, 22, 31)]]
"""(sequence, first position, tokens): the third has one row, the last as many as there may be."""

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture
def kernels():
    if not native_library.is_built():
        pytest.skip("the kernels were not compiled: there was no C++ compiler at installation")
    return NativeKernels()


class Layers:
    """Two small layers that use every kernel."""

    def __init__(self, kernels, dtype):
        self.kernels = kernels
        generator = torch.Generator().manual_seed(5)

        def weight(*shape):
            return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

        qkv_width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.norm = torch.rand(HIDDEN, generator=generator)
        self.norms = torch.rand(HEAD_DIM, generator=generator), torch.rand(HEAD_DIM, generator=generator)
        self.layers = [
            (
                kernels.linear(weight(qkv_width, HIDDEN), weight(qkv_width)),
                kernels.linear(weight(HIDDEN, HEADS * HEAD_DIM)),
                kernels.gated_linear(weight(2 * WIDTH, HIDDEN), weight(2 * WIDTH), "gelu_tanh"),
                kernels.linear(weight(HIDDEN, WIDTH)),
            )
            for _ in range(2)
        ]
        self.caches = [[torch.zeros(KV_HEADS, 64, BLOCK, HEAD_DIM, dtype=dtype) for _ in range(2)] for _ in range(2)]

    def run(self, hidden, rotation, plan):
        kernels = self.kernels
        for (qkv, output, gated, down), caches in zip(self.layers, self.caches, strict=True):
            kernels.begin_layer()
            heads = qkv(kernels.rms_norm(hidden, self.norm, 1e-5)).view(-1, HEADS + 2 * KV_HEADS, HEAD_DIM)
            query = kernels.rotate_and_store(heads, rotation, *caches, plan, norms=self.norms, eps=1e-5)
            attended = kernels.attention(query, *caches, plan, scale=0.3, window=None, softcap=None)
            partial = kernels.on_host(lambda x: x.mul_(1.5), output(attended), in_place=True)
            kernels.rms_norm(partial, self.norm, 1e-5, in_place=True)
            kernels.add_(hidden, partial, 0.7)
            x = kernels.on_host(lambda x: x.flip(1) + len(x), kernels.rms_norm(hidden, self.norm, 1e-5))
            down.add_to(hidden, gated(x), 0.9)


def inputs(blocks, rows, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    metadata = blocks.metadata(rows)
    total = sum(metadata.counts)
    angles = metadata.positions[:, None] * torch.rand(HEAD_DIM // 2, generator=generator)
    return metadata, torch.randn(total, HIDDEN, generator=generator).to(dtype), (angles.cos(), angles.sin())


@dtypes
@pytest.mark.parametrize("threads", [1, 3])
def test_a_program_gives_every_bit_of_its_kernels_and_leaves_the_rows_behind_a_step_alone(kernels, dtype, threads):
    torch.set_num_threads(threads)
    at_once, recorded = Layers(kernels, dtype), Layers(kernels, dtype)
    program = kernels.new_program(MAX_ROWS)
    buffer = program.buffer(HIDDEN, dtype)
    rotation = tuple(program.buffer(HEAD_DIM // 2, torch.float32) for _ in range(2))
    with program.recording():
        recorded.run(buffer, rotation, program.plan())
    assert not buffer.any(), "recording computed something"
    assert not any(cache.any() for caches in recorded.caches for cache in caches)

    blocks = BlockTables(BLOCK, 64)
    for seed, rows in enumerate(STEPS):
        metadata, hidden, angles = inputs(blocks, rows, dtype, seed)
        total = len(hidden)
        buffer.fill_(SENTINEL)
        buffer[:total] = hidden
        for part, given in zip(rotation, angles, strict=True):
            part.fill_(SENTINEL)
            part[:total] = given
        program.run(kernels.plan(metadata, BLOCK))
        at_once.run(hidden, angles, kernels.plan(metadata, BLOCK))
        assert torch.equal(buffer[:total], hidden)
        assert (buffer[total:] == SENTINEL).all()
        for mine, theirs in zip(at_once.caches, recorded.caches, strict=True):
            assert all(map(torch.equal, mine, theirs))


def test_the_compiled_kernels_do_what_torch_does(kernels):
    compiled, plain = (Layers(it, torch.float32) for it in (kernels, TorchKernels(CPU, torch.float32)))
    blocks = BlockTables(BLOCK, 64)
    for seed, rows in enumerate(STEPS):
        metadata, hidden, angles = inputs(blocks, rows, torch.float32, seed)
        expected = hidden.clone()
        compiled.run(hidden, angles, compiled.kernels.plan(metadata, BLOCK))
        plain.run(expected, angles, plain.kernels.plan(metadata, BLOCK))
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


def test_temporaries_of_a_layer_lie_apart_and_the_next_layer_takes_their_place(kernels):
    program = kernels.new_program(6)
    like = torch.empty(1, 1)
    layers = []
    with program.recording():
        for widths in ([10, 30, 1], [40, 7, 90, 3], [10, 30, 1]):
            kernels.begin_layer()
            dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)
            layers.append([kernels.temporary(like, *kind) for kind in zip(widths, dtypes, strict=False)])
    for layer in layers:
        for tensor in layer:
            assert tensor.shape[0] == 6
            assert tensor.is_contiguous()
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in layer)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    # The third layer fits into what the second had to enlarge.
    assert [t.data_ptr() for t in layers[2]] == [t.data_ptr() for t in layers[1][:3]]


def test_parts_on_the_host_see_the_rows_of_the_step_and_run_in_their_order(kernels):
    program = kernels.new_program(5)
    buffer, seen = program.buffer(3, torch.float32), []
    added = torch.full((5, 3), 10.0)

    def double(x):
        seen.append(len(x))
        return x.mul_(2)

    def negated(x):
        seen.append(-len(x))
        return -x

    with program.recording():
        kernels.add_(buffer, added, 1.0)
        assert kernels.on_host(double, buffer, in_place=True) is buffer
        copy = kernels.on_host(negated, buffer)
        kernels.add_(buffer, copy, 0.25)
    assert seen == []
    for rows in (2, 5, 1):
        buffer.fill_(SENTINEL)
        buffer[:rows] = 1.0
        program.run(plan_of(kernels, rows))
        assert (buffer[:rows] == 22.0 - 0.25 * 22.0).all()
        assert (buffer[rows:] == SENTINEL).all()
    assert seen == [2, -2, 5, -5, 1, -1]


def test_a_failing_part_leaves_the_kernels_usable(kernels):
    def fail(x):
        raise ValueError("a peer is gone")

    program = kernels.new_program(4)
    buffer = program.buffer(3, torch.float32)
    with program.recording():
        kernels.on_host(fail, buffer, in_place=True)
    with pytest.raises(ValueError, match="a peer is gone"):
        program.run(plan_of(kernels, 2))

    broken = kernels.new_program(4)
    with pytest.raises(ValueError, match="a peer is gone"), broken.recording():
        fail(buffer)
    kernels.add_(buffer, torch.ones(4, 3), 1.0)
    assert (buffer == 1.0).all(), "what is called after a failed recording runs at once"


def test_a_step_that_is_too_large_is_refused(kernels):
    program = kernels.new_program(4)
    with program.recording():
        kernels.add_(program.buffer(3, torch.float32), torch.ones(4, 3), 1.0)
    with pytest.raises(AssertionError):
        program.run(plan_of(kernels, 5))


def test_a_recorded_norm_reads_which_rows_it_takes_when_it_runs(kernels):
    program = kernels.new_program(3)
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(0))
    weight, rows = torch.ones(HIDDEN), torch.zeros(3, dtype=torch.int64)
    with program.recording():
        normalised = kernels.rms_norm(x, weight, 1e-5, rows=rows)
    for chosen in ([4, 0, 6], [5], [6, 6]):
        rows[: len(chosen)] = torch.tensor(chosen)
        program.run_rows(len(chosen))
        assert torch.equal(normalised[: len(chosen)], kernels.rms_norm(x, weight, 1e-5)[chosen])


def test_products_of_a_program_are_compiled_ones(kernels):
    program, weight = kernels.new_program(3), torch.randn(5, HIDDEN)
    assert program.can_record(kernels.linear(weight))
    assert program.can_record(kernels.tied_linear(weight))
    assert not program.can_record(NativeKernels(compiled_products=False).linear(weight))
    assert not program.can_record(TorchKernels(CPU, torch.float32).linear(weight))


def test_torch_has_nothing_to_record():
    assert TorchKernels(CPU, torch.float32).new_program(4) is None


def plan_of(kernels, rows):
    return kernels.plan(BlockTables(BLOCK, 64).metadata([(0, 0, rows)]), BLOCK)
