"""The attention kernel where `tests/kernels/test_paged_attention.py` does not go: formats, head sizes, divided work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import BlockTables

from raytroupe.kernels.gpu.attention_work import ITEM_FIELDS, MIN_ITEM_KEYS, max_items, max_partials, padded, plan_work
from raytroupe.kernels.gpu.paged_attention import KINDS, AttentionShape, PagedAttention, choose_tiles, warps_for
from raytroupe.kernels.gpu.triton_kernels import TritonKernels
from raytroupe.kernels.paged_attention import store_kv
from raytroupe.kernels.torch_kernels import TorchKernels

CPU = torch.device("cpu")
NUM_BLOCKS = 128


class Batch:
    """A cache that holds random keys and values for rows of (context, query tokens)."""

    def __init__(self, rows, heads, kv_heads, head_dim, dtype, generator, *, block_size=16, stored=None):
        rows = sorted(rows, key=lambda row: row[1] != 1)
        self.blocks = BlockTables(block_size, NUM_BLOCKS)
        self.block_size = block_size
        shape = (kv_heads, NUM_BLOCKS, block_size, head_dim)
        self.caches = tuple(torch.zeros(shape, dtype=stored or dtype) for _ in range(2))
        self.scales = None if stored is None else tuple(torch.ones(shape[:3]) for _ in range(2))
        whole = self.blocks.metadata(
            [(i, 0, context) for i, (context, _) in enumerate(rows) if context > 1] or [(0, 0, 1)]
        )
        tokens = len(whole.slot_mapping)
        keys, values = (torch.randn(tokens, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        store_kv(keys, values, *self.caches, whole.slot_mapping, self.scales)
        self.metadata = self.blocks.metadata([(i, context - count, count) for i, (context, count) in enumerate(rows)])
        self.query = torch.randn(len(self.metadata.positions), heads, head_dim, generator=generator).to(dtype)

    def run(self, kernels, **options):
        plan = kernels.plan(self.metadata, self.block_size)
        options = {"scale": 0.3, "window": None, "softcap": None, **options}
        return kernels.attention(self.query, *self.caches, plan, scales=self.scales, **options)

    def check(self, dtype, **options):
        mine = self.run(TritonKernels(CPU, dtype), **options)
        theirs = self.run(TorchKernels(CPU, dtype), **options)
        # Both sum hundreds of products, each in an order that depends on the processor.
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(mine, theirs, **close)


@pytest.mark.launches("paged_attention_kernel", "merge_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("options", [{}, {"window": 190, "softcap": 2.0}], ids=["plain", "window and cap"])
def test_formats(dtype, stored, options, generator):
    rows = [(300, 1), (5, 1), (400, 1), (40, 9), (200, 40)]
    Batch(rows, 6, 2, 16, dtype, generator, stored=stored).check(dtype, **options)


@pytest.mark.launches("paged_attention_kernel")
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (4, 4), (40, 2)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_head_sizes_and_groups(heads, kv_heads, head_dim, generator):
    Batch([(33, 1), (200, 1), (70, 20)], heads, kv_heads, head_dim, torch.float32, generator).check(torch.float32)


@pytest.mark.launches("paged_attention_kernel")
@pytest.mark.parametrize("block_size", [4, 8, 32, 64, 128])
@pytest.mark.parametrize("window", [None, 50])
def test_block_sizes(block_size, window, generator):
    batch = Batch([(129, 1), (70, 1), (128, 30)], 4, 2, 16, torch.float32, generator, block_size=block_size)
    batch.check(torch.float32, window=window)


@pytest.mark.launches("paged_attention_kernel", "merge_kernel")
def test_padded_work_of_a_recorded_step(generator):
    """Work of a fixed size, uploaded beforehand, that names rows of a larger table of blocks."""
    batch = Batch([(400, 1), (9, 1), (130, 1)], 4, 2, 16, torch.float32, generator)
    kernels, metadata = TritonKernels(CPU, torch.float32), batch.metadata
    expected = batch.run(kernels)
    shape, slots = AttentionShape(4, 2, 16), np.array([7, 2, 5])
    arrays = kernels.attend.host_work(
        shape, (None, 64), np.array(metadata.counts), np.array(metadata.contexts), slots, 3, padded_rows=8
    )
    sizes = {name: array.shape for name, array in arrays.items()}
    shorter = kernels.attend.host_work(shape, (None, 64), np.ones(1, int), np.ones(1, int), slots[:1], 1, padded_rows=8)
    assert {name: array.shape for name, array in shorter.items()} == sizes
    metadata.work = kernels.attend.step_work({k: torch.from_numpy(a) for k, a in arrays.items()}, (None, 64))
    tables = torch.zeros(9, metadata.block_tables.shape[1] + 3, dtype=torch.int32)
    tables[slots, : metadata.block_tables.shape[1]] = metadata.block_tables
    metadata.block_tables = tables
    torch.testing.assert_close(batch.run(kernels), expected)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3000)), min_size=1, max_size=12),
    st.sampled_from([1, 4, 32]),
    st.sampled_from([16, 64]),
    st.sampled_from([None, 1, 100, 1000]),
    st.integers(1, 60),
)
@settings(max_examples=150, deadline=None)
def test_work_covers_every_key_of_every_token_once(rows, tile_tokens, tile_keys, window, target):
    counts = np.array([count for count, _ in rows])
    contexts = np.array([count + before for count, before in rows])
    first = np.cumsum(counts) - counts
    work = plan_work(
        first, counts, contexts, np.arange(len(rows)) + 5,
        tile_tokens=tile_tokens, tile_keys=tile_keys, window=window, target=target,
    )  # fmt: skip
    tiles = int((-(-counts // tile_tokens)).sum())
    assert len(work.items) <= max_items(tiles, target)
    spans: dict[int, list[tuple[int, int, int]]] = {}
    partials = []
    for token, tokens, table_row, position, begin, end, partial, zero in work.items.tolist():
        row = table_row - 5
        assert zero == 0
        assert 1 <= tokens <= tile_tokens
        assert first[row] <= token
        assert token + tokens <= first[row] + counts[row]
        assert position == contexts[row] - counts[row] + token - first[row]
        assert begin % tile_keys == 0
        assert begin < end <= position + tokens
        partials += [partial] if partial >= 0 else []
        for index in range(tokens):
            spans.setdefault(token + index, []).append((begin, end, partial))
            if window and partial < 0:
                assert begin <= max(0, position + index - window + 1)
    assert sorted(partials) == list(range(len(partials)))
    assert len(partials) <= max_partials(target)
    assert sorted(spans) == list(range(counts.sum()))
    merged = {token: (partial, count, index) for token, partial, count, index in work.merges.tolist()}
    for token, parts in spans.items():
        row = int(np.searchsorted(first, token, "right")) - 1
        position = contexts[row] - counts[row] + token - first[row]
        parts.sort()
        assert parts[0][0] <= max(0, position + 1 - (window or position + 1))
        assert [end for _, end, _ in parts[:-1]] == [begin for begin, _, _ in parts[1:]]
        assert parts[-1][1] > position
        if len(parts) == 1:
            assert parts[0][2] == -1
            assert token not in merged
        else:
            partial, count, _ = merged[token]
            assert [part for _, _, part in parts] == list(range(partial, partial + count))


def test_equal_shares_of_unequal_rows():
    counts, contexts = np.ones(64, int), np.array([32_000, *[1000] * 63])
    work = plan_work(
        np.arange(64), counts, contexts, np.arange(64), tile_tokens=4, tile_keys=64, window=None, target=200
    )
    lengths = work.items[:, 5] - work.items[:, 4]
    assert lengths.max() <= 2 * max(MIN_ITEM_KEYS, contexts.sum() / 200)
    assert (np.diff(lengths) <= 0).all(), "longest first"
    assert padded(work.items, 300).shape == (300, ITEM_FIELDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_tiles_fit_the_device(kind, head_dim, kilobytes):
    for group in (1, 3, 8, 40):
        tiles = choose_tiles(AttentionShape(group, 1, head_dim), 2, kind, kilobytes * 1024)
        assert tiles.rows >= max(16, group)
        assert tiles.rows & (tiles.rows - 1) == 0
        assert warps_for(tiles, True) == 8
        dims = 256 if head_dim > 128 else 128 if head_dim > 64 else 64
        assert (tiles.rows + 2 * tiles.keys) * dims * 2 <= kilobytes * 1024


def test_the_workspace_is_made_once():
    attention = PagedAttention(CPU, torch.bfloat16, 132, 227 * 1024)
    shape = AttentionShape(32, 8, 128)
    assert attention._partials(shape, "decode")[0] is attention._partials(shape, "decode")[0]
