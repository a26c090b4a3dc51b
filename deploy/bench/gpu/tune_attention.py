"""Tuning of attention: tiles for decode rows and for prompts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch

from ....kernels.gpu.paged_attention import KINDS, PagedAttention, Tiles, TritonPlan
from ....kernels.gpu.triton_kernels import device_limits
from ....kernels.gpu.tuning import dtype_name
from ....kernels.uploads import Uploads
from .paged_step import BLOCK_SIZE, blocks_needed, paged_step
from .timing import median_seconds, sets_beyond_cache
from .tuning_search import Task, Tuned, entry_of, fastest

REPEATS = 5
HEADS, KV_HEADS = 32, 8
HEAD_DIMS = (128, 64)
DTYPE = torch.bfloat16
STEPS = {"decode": [(1, 1024)] * 16 + [(1, 8192)] * 16, "prefill": [(8192, 8192)]}
"""Query tokens and contexts of the rows that stand for a kind."""


def attention_tasks() -> list[Task]:
    """Both kinds of rows, for the common head sizes."""
    return [functools.partial(tune_attention, kind, head_dim) for head_dim in HEAD_DIMS for kind in KINDS]


def candidates(kind: str) -> Iterator[Tiles]:
    """Configurations worth trying, the most promising first."""
    if kind == "decode":
        tried = itertools.product((5, 7, 3), (64, 128, 32), (4, 8, 2), (8, 16, 4))
        return (Tiles(16, keys, warps, stages, programs) for stages, keys, warps, programs in tried)
    shapes = itertools.product((3, 4, 2), ((128, 64), (128, 128), (64, 64), (64, 128), (128, 32)), (8, 4))
    return (Tiles(rows, keys, warps, stages, 2) for stages, (rows, keys), warps in shapes)


def tune_attention(kind: str, head_dim: int, device: torch.device, deadline: float) -> Tuned:
    """The fastest tiles for rows of one kind; keys and values of a step come from another layer each time."""
    rows = STEPS[kind]
    tokens, contexts = sum(count for count, _ in rows), sum(context for _, context in rows)
    moved = 2 * contexts * KV_HEADS * head_dim * DTYPE.itemsize
    shape = (KV_HEADS, blocks_needed(rows), BLOCK_SIZE, head_dim)
    caches = [
        tuple(torch.randn(shape, dtype=DTYPE, device=device) for _ in range(2))
        for _ in range(sets_beyond_cache(moved, device))
    ]
    query = torch.randn(tokens, HEADS, head_dim, dtype=DTYPE, device=device)
    metadata = paged_step(rows, device)

    def seconds(tiles: Tiles) -> float:
        attention = PagedAttention(device, DTYPE, *device_limits(device), tiles)
        plan = TritonPlan(metadata, attention, Uploads(device))
        options = {"scale": head_dim**-0.5, "window": None, "softcap": None, "scales": None}
        calls = [
            functools.partial(attention, query, keys, values, metadata.block_tables, plan.work, **options)
            for keys, values in caches
        ]
        return median_seconds(calls, device, repeats=REPEATS).seconds

    best = fastest(candidates(kind), seconds, deadline)
    taken = seconds(best)
    values = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(best).items())
    row = {
        "kernel": f"attention, {kind}", "outputs": head_dim, "inputs": contexts, "rows": tokens, "config": values,
        "ours": taken * 1e6, "bandwidth": moved / taken / 1e9,
    }  # fmt: skip
    exact: dict[str, str | int] = {"rows": kind, "dtype": dtype_name(DTYPE)}
    return Tuned("attention", entry_of(exact, {"head_dim": head_dim}, best), [row])
