"""Single kernels against the ceilings: bytes or floating-point operations that the work needs, over the time it takes.

Inputs are random and rotated, so that the cache does not lie: attention goes from layer to layer of one KV cache, as a
model does. Counted is what has to be moved, once: keys and values, inputs and outputs. Launching is not part of it,
because the engine replays recorded steps (`timing.py`).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ....actors.kv_cache import KVCache
from ....cluster.model_spec import load_spec
from ....cluster.topology import ShardLayout
from ....kernels.backend import load_kernels
from ....kernels.gpu.activation import gated_activation
from ....kernels.gpu.norm import add_rms_norm
from .ceilings import of_bandwidth, of_matrix_rate
from .engine_models import LLAMA_3_8B, write_model
from .paged_step import BLOCK_SIZE, blocks_needed, paged_step
from .part import PartContext
from .timing import free_memory, median_seconds, sets_beyond_cache

DTYPE = torch.bfloat16
ITEM = DTYPE.itemsize
BATCHES = (1, 16, 64)
CONTEXTS = (1024, 8192, 32_768)
WIDEST = BATCHES[-1]
PREFILL, CHUNK = 8192, 2048
TOKENS = 8192
"""Of the elementwise kernels."""
DECODE_TARGET, PREFILL_TARGET, ELEMENTWISE_TARGET = 0.80, 0.55, 0.85
SKEW = (256, 32_768)
"""Shortest and longest of skewed contexts, whose logarithms are uniform."""


def measure(context: PartContext) -> None:
    """All points, in the shape of Llama-3-8B: 32 heads, 8 KV heads of 128, hidden size 4096."""
    points = KernelPoints(context)
    batches, contexts = ((1, 2), (40, 72)) if context.tiny else (BATCHES, CONTEXTS)
    for batch in batches:
        for length in contexts:
            target = DECODE_TARGET if batch == WIDEST else None
            points.attention(f"decode, batch {batch} × {length:,}", [(1, length)] * batch, target)
    points.attention("decode, skewed lengths", [(1, length) for length in skewed_lengths(context.tiny)], DECODE_TARGET)
    prefill, chunk = (48, 24) if context.tiny else (PREFILL, CHUNK)
    points.attention(f"prefill {prefill:,}", [(prefill, prefill)], PREFILL_TARGET)
    points.attention(f"chunk of {chunk:,} after {prefill - chunk:,}", [(chunk, prefill)])
    points.elementwise(32 if context.tiny else TOKENS)
    points.products((1, 2) if context.tiny else (1, 64))


def skewed_lengths(tiny: bool) -> list[int]:
    """Contexts of a batch of which a few are long."""
    shortest, longest = (8, 96) if tiny else SKEW
    numbers = random.Random(0)
    low, high = math.log(shortest), math.log(longest)
    return [round(math.exp(numbers.uniform(low, high))) for _ in range(4 if tiny else WIDEST)]


class KernelPoints:
    """Measures and reports; every point makes its own kernels and cache."""

    def __init__(self, context: PartContext) -> None:
        self._context = context
        self._device = context.device
        self._spec = load_spec(write_model(context.folder / "shape", LLAMA_3_8B, tiny=context.tiny))

    def attention(self, what: str, rows: Sequence[tuple[int, int]], target: float | None = None) -> None:
        """Rows as in `paged_step`. Steps of single tokens are compared with the bandwidth, others with the matrix
        rate."""
        what = f"attention, {what}"
        spec, device = self._spec, self._device
        free_memory(device)
        with self._context.guard(what):
            contexts = sum(context for _, context in rows)
            tokens = sum(count for count, _ in rows)
            moved = ITEM * spec.head_dim * 2 * (contexts * spec.num_kv_heads + tokens * spec.num_heads)
            caches = self._caches(sets_beyond_cache(moved, device), blocks_needed(rows))
            kernels = load_kernels(device, DTYPE)
            plan = kernels.plan(paged_step(rows, device), BLOCK_SIZE)
            query = torch.randn(tokens, spec.num_heads, spec.head_dim, dtype=DTYPE, device=device)
            attend = functools.partial(kernels.attention, scale=spec.attention_scale, window=None, softcap=None)
            calls = [functools.partial(attend, query, keys, values, plan) for keys, values in caches]
            timing = median_seconds(calls, device)
            what += "" if timing.recorded or device.type == "cpu" else ", launched"
            if tokens == len(rows):
                row = of_bandwidth(self._context, what, moved, timing.seconds, target)
            else:
                pairs = sum(count * (context - count) + count * (count + 1) // 2 for count, context in rows)
                flops = 4 * spec.num_heads * spec.head_dim * pairs
                row = of_matrix_rate(self._context, what, flops, timing.seconds, target)
            self._context.report(row)

    def elementwise(self, tokens: int) -> None:
        """Norm, rotation with the writing of keys and values, and activation."""
        spec, device = self._spec, self._device
        kernels, width, heads = load_kernels(device, DTYPE), spec.hidden_size, spec.num_heads + 2 * spec.num_kv_heads
        inner = spec.intermediate_size
        weight = torch.rand(width, device=device) + 0.5
        self._rows(f"RMS norm, {tokens:,} tokens", 2, tokens, width, lambda x: kernels.rms_norm(x, weight, 1e-5))
        # These two are parts of larger operations in the kernels' interface.
        residual = torch.randn(tokens, width, dtype=DTYPE, device=device)
        self._rows(
            f"residual + RMS norm, {tokens:,} tokens", 4, tokens, width,
            lambda x: add_rms_norm(x, residual, 1.0, weight, 1e-5),
        )  # fmt: skip
        self._rows(
            f"SiLU · up, {tokens:,} tokens", 3, tokens, 2 * inner, lambda x: gated_activation(x, "silu"), parts=2
        )

        what = f"rotary + KV store, {tokens:,} tokens"
        free_memory(device)
        with self._context.guard(what):
            rows = [(tokens, tokens)]
            # Read: queries, keys, values, cosines and sines, slots. Written: queries in place, keys and values.
            moved = tokens * (2 * heads * spec.head_dim * ITEM + spec.head_dim * 4 + 8)
            caches = self._caches(sets_beyond_cache(moved, device), blocks_needed(rows))
            plan = kernels.plan(paged_step(rows, device), BLOCK_SIZE)
            frequencies = torch.rand(spec.head_dim // 2, device=device)
            rotation = kernels.rotation(plan.metadata.positions, frequencies, 1.0)
            qkv = torch.randn(tokens, heads, spec.head_dim, dtype=DTYPE, device=device)
            calls = [
                functools.partial(
                    kernels.rotate_and_store, qkv.clone(), rotation, keys, values, plan, norms=None, eps=1e-5
                )
                for keys, values in caches
            ]
            seconds = median_seconds(calls, device).seconds
            self._context.report(of_bandwidth(self._context, what, moved, seconds, ELEMENTWISE_TARGET))

    def products(self, batches: Sequence[int]) -> None:
        """The largest product of a decode step, whose weight is what batch-1 decoding reads."""
        spec, device = self._spec, self._device
        for batch in batches:
            what = f"product {spec.hidden_size:,} → {2 * spec.intermediate_size:,}, {batch} rows"
            free_memory(device)
            with self._context.guard(what):
                kernels = load_kernels(device, DTYPE)
                shape = (2 * spec.intermediate_size, spec.hidden_size)
                moved = ITEM * (math.prod(shape) + batch * sum(shape))
                weights = [
                    kernels.linear(torch.randn(shape, dtype=DTYPE, device=device))
                    for _ in range(sets_beyond_cache(moved, device))
                ]
                x = torch.randn(batch, spec.hidden_size, dtype=DTYPE, device=device)
                seconds = median_seconds([functools.partial(linear, x) for linear in weights], device).seconds
                self._context.report(of_bandwidth(self._context, what, moved, seconds))

    def _rows(
        self, what: str, passes: int, tokens: int, width: int, call: Callable[[Tensor], object], parts: int = 1
    ) -> None:
        """A kernel over rows [tokens, width] that moves `passes` times the elements of one of the row's `parts`."""
        device = self._device
        free_memory(device)
        with self._context.guard(what):
            moved = passes * tokens * width // parts * ITEM
            inputs = [
                torch.randn(tokens, width, dtype=DTYPE, device=device) for _ in range(sets_beyond_cache(moved, device))
            ]
            seconds = median_seconds([functools.partial(call, x) for x in inputs], device).seconds
            self._context.report(of_bandwidth(self._context, what, moved, seconds, ELEMENTWISE_TARGET))

    def _caches(self, layers: int, num_blocks: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of so many layers, laid out as the engine's and filled with random numbers."""
        folder = self._context.folder / f"layers-{layers}"
        if not folder.exists():
            write_model(folder, LLAMA_3_8B, tiny=self._context.tiny, num_hidden_layers=layers)
        cache = KVCache(load_spec(folder), ShardLayout(), num_blocks, BLOCK_SIZE, DTYPE, self._device)
        caches = [(layer.keys, layer.values) for layer in map(cache.layer, range(layers))]
        for keys, values in caches:
            keys.normal_()
            values.normal_()
        return caches
