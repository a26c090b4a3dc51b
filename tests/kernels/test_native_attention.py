"""The compiled attention against float64: mixed batches of every shape, all instruction sets, any number of threads."""

import dataclasses
import math
import random

import pytest
import torch
from torch import Tensor

from raytroupe.kernels import native_library
from raytroupe.kernels.native_library import INSTRUCTION_SETS, AttentionOperation, Kind, OperationList, Step, Stored
from raytroupe.kernels.quantised_kv import quantise

pytestmark = pytest.mark.skipif(
    not native_library.is_built(), reason="the kernels were not compiled: there was no C++ compiler at installation"
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
STORED = {None: Stored.AS_COMPUTED, torch.int8: Stored.INT8, torch.float8_e4m3fn: Stored.FLOAT8}

stored_types = pytest.mark.parametrize("stored", STORED, ids=["as computed", "int8", "fp8"])


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    usual = native_library.instruction_set()
    try:
        native_library.use_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"this processor lacks {request.param}")
    yield request.param
    native_library.use_instruction_set(usual)


@dataclasses.dataclass
class Shape:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    window: int = 0
    softcap: float = 0.0
    stored: torch.dtype | None = None
    """What the cache holds, if not `dtype`."""


class Batch:
    """Sequences of (queries, context) tokens in shuffled blocks; what else is in the cache is NaN, or has such
    scales."""

    def __init__(self, shape: Shape, sequences: list[tuple[int, int]], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random_numbers(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(shape.dtype)

        self.shape, self.sequences = shape, sequences
        blocks = [-(-context // shape.block_size) for _, context in sequences]
        num_blocks = sum(blocks) + 2
        size = (shape.kv_heads, num_blocks, shape.block_size, shape.head_dim)
        self.k_cache, self.v_cache = (torch.full(size, math.nan, dtype=shape.dtype) for _ in range(2))
        shuffled = iter(torch.randperm(num_blocks, generator=generator).tolist())
        self.block_tables = torch.zeros(len(sequences), max(blocks) + 1, dtype=torch.int32)
        for row, (_, context) in enumerate(sequences):
            for block in range(blocks[row]):
                self.block_tables[row, block] = next(shuffled)
            tokens = torch.arange(context)
            places = self.block_tables[row].long()[tokens // shape.block_size], tokens % shape.block_size
            for cache in (self.k_cache, self.v_cache):
                cache[:, *places] = random_numbers(shape.kv_heads, context, shape.head_dim)
        self.rows = sum(queries for queries, _ in sequences)
        self.scales: list[Tensor] = []
        if shape.stored is not None:
            for name in ("k_cache", "v_cache"):
                cache = getattr(self, name)
                theirs = ~cache.isnan().any(-1)
                numbers, scales = quantise(cache.nan_to_num(), shape.stored)
                self.scales.append(scales.masked_fill(~theirs, math.nan))
                setattr(self, name, numbers)
        # Queries lie in a wider matrix, as they do beside keys and values.
        self.query = random_numbers(self.rows, shape.heads + 3, shape.head_dim)[:, : shape.heads]

    def run(self, threads: int = 2, only: int | None = None) -> Tensor:
        """All rows, or those of one sequence as if it were alone."""
        shape = self.shape
        chosen = range(len(self.sequences)) if only is None else [only]
        counts = [self.sequences[row][0] for row in chosen]
        first = sum(queries for queries, _ in self.sequences[: chosen[0]])
        query_start = torch.tensor([0, *counts]).cumsum(0).int()
        context_lens = torch.tensor([self.sequences[row][1] for row in chosen], dtype=torch.int32)
        block_tables = self.block_tables[list(chosen)]
        query = self.query[first : first + sum(counts)]
        out = torch.full((sum(counts), shape.heads, shape.head_dim), math.nan, dtype=shape.dtype)
        operation = AttentionOperation(
            kind=Kind.ATTENTION,
            bfloat16=shape.dtype == torch.bfloat16,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            block_size=shape.block_size,
            window=shape.window,
            scale=shape.head_dim**-0.5,
            softcap=shape.softcap,
            query=query.data_ptr(),
            k_cache=self.k_cache.data_ptr(),
            v_cache=self.v_cache.data_ptr(),
            out=out.data_ptr(),
            query_stride=query.stride(0),
            out_stride=out.stride(0),
            num_blocks=self.k_cache.shape[1],
            k_scales=self.scales[0].data_ptr() if self.scales else None,
            v_scales=self.scales[1].data_ptr() if self.scales else None,
            stored=STORED[shape.stored],
        )
        step = Step(
            query_start=query_start.data_ptr(),
            context_lens=context_lens.data_ptr(),
            block_tables=block_tables.data_ptr(),
            rows=len(out),
            sequences=len(counts),
            decode_rows=counts.count(1),
            table_width=block_tables.stride(0),
            threads=threads,
        )
        OperationList([operation]).run(step)
        return out

    def expected(self) -> Tensor:
        """float64 [rows, heads, head_dim]."""
        shape, attended, first = self.shape, [], 0
        for row, (queries, context) in enumerate(self.sequences):
            blocks = self.block_tables[row, : -(-context // shape.block_size)].long()
            keys, values = (
                cache[:, blocks].flatten(1, 2)[:, :context].repeat_interleave(shape.heads // shape.kv_heads, 0)
                for cache in self.numbers()
            )
            query = self.query[first : first + queries].double().transpose(0, 1)
            scores = query @ keys.transpose(1, 2) * shape.head_dim**-0.5
            if shape.softcap:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            position, key = torch.arange(context - queries, context)[:, None], torch.arange(context)
            hidden = key > position
            if shape.window:
                hidden |= key <= position - shape.window
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            attended.append((weights @ values).transpose(0, 1))
            first += queries
        return torch.cat(attended)

    def numbers(self) -> list[Tensor]:
        """What keys and values mean, float64."""
        caches = [cache.double() for cache in (self.k_cache, self.v_cache)]
        return [c * s[..., None].double() for c, s in zip(caches, self.scales, strict=True)] if self.scales else caches

    def check(self, threads: int = 2, tolerance: float | None = None) -> None:
        allowed = tolerance or TOLERANCE[self.shape.dtype]
        torch.testing.assert_close(self.run(threads).double(), self.expected(), rtol=0, atol=allowed)


def random_batch(seed: int, dtype: torch.dtype, stored: torch.dtype | None) -> Batch:
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3])
    shape = Shape(
        heads=kv_heads * rng.choice([1, 2, 3, 4, 7, 8, 16]),
        kv_heads=kv_heads,
        head_dim=rng.choice([7, 10, 16, 20, 64, 80, 96, 128, 256]),
        block_size=rng.choice([1, 3, 16, 32, 100]),
        dtype=dtype,
        stored=stored,
        window=rng.choice([0, 0, 1, 5, 30, 100, 700]),
        softcap=rng.choice([0.0, 0.0, 2.0, 30.0]),
    )
    counts = [1] * rng.randint(0, 4) + [rng.choice([2, 3, 17, 64, 97, 150]) for _ in range(rng.randint(1, 2))]
    return Batch(shape, [(count, count + rng.choice([0, 1, 15, 63, 100, 600, 1100])) for count in counts], seed)


@stored_types
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_mixed_batches_match_float64(instruction_set, dtype, stored, seed):
    random_batch(seed, dtype, stored).check()


@stored_types
@pytest.mark.parametrize("window", [1, 3, 16, 127, 128, 129, 1000])
def test_windows_match_float64(window, stored):
    """Smaller than a block, than a tile of keys and than the chunk, and so that some queries see nothing of a tile."""
    Batch(Shape(window=window, stored=stored), [(1, 400), (1, 1), (200, 700)]).check()


@stored_types
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_few_rows_match_float64(head_dim, group, stored):
    """Which are multiplied without packing keys and values where there are instructions for it."""
    shape = Shape(heads=2 * group, head_dim=head_dim, dtype=torch.bfloat16, stored=stored, window=260, softcap=20.0)
    Batch(shape, [(1, 700), (1, 1), (1, 129), (2, 90), (3, 400)]).check()


@stored_types
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_result_does_not_depend_on_the_number_of_threads(instruction_set, dtype, stored):
    """Some contexts are cut into pieces, which different threads attend to."""
    batch = Batch(Shape(dtype=dtype, stored=stored), [(1, 3000), (1, 1100), (1, 90), (5, 1500), (130, 260)])
    batch.check()
    alone = batch.run(threads=1)
    for threads in (2, 3, 8, 16):
        assert torch.equal(batch.run(threads), alone)


@stored_types
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_sequence_alone_and_in_a_batch_are_bitwise_the_same(instruction_set, dtype, stored):
    batch = Batch(Shape(dtype=dtype, stored=stored), [(1, 33), (1, 1400), (1, 600), (3, 900), (70, 80)])
    together, first = batch.run(), 0
    for row, (queries, _) in enumerate(batch.sequences):
        assert torch.equal(together[first : first + queries], batch.run(only=row))
        first += queries


@stored_types
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_query_breaks_no_other(instruction_set, broken, dtype, stored):
    batch = Batch(Shape(dtype=dtype, stored=stored), [(1, 700), (1, 40), (9, 60)])
    whole = batch.run()
    for row in (0, 4):
        batch.query[row] = broken
    rest = [row for row in range(batch.rows) if row not in (0, 4)]
    out = batch.run()
    assert torch.equal(out[rest], whole[rest])
    assert out[[0, 4]].isnan().all()


def test_large_scores_do_not_overflow(instruction_set):
    batch = Batch(Shape(), [(1, 300), (40, 90)])
    batch.query *= 100  # e^score would be infinite, and a score's last digits weigh more
    batch.check(tolerance=1e-3)


def test_a_context_of_100000_tokens():
    """As many pieces as there may be, of several thousand tokens each."""
    Batch(Shape(heads=2, kv_heads=1, head_dim=16), [(1, 100_000), (3, 70_000)]).check()
