"""Every operation of the kernels' interface on random inputs against its meaning: the torch kernels in float32.

Compared is ‖got - expected‖ / ‖expected‖ over the whole result. Inputs are rounded to the checked dtype first, so that
both sides compute on the same numbers; what is left is the rounding of results and of steps in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ....kernels.backend import load_kernels
from ....kernels.interface import Kernels
from ....kernels.quantised_kv import dequantise, quantise
from ....kernels.torch_kernels import TorchKernels
from .paged_step import blocks_needed, paged_step
from .part import PartContext, Row

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
INTERPRETER_FACTOR = 3
"""Triton's interpreter cuts bfloat16 off instead of rounding it: errors are larger, and all in one direction."""
Case = tuple[str, Tensor, Tensor]
"""What was tried, what the kernels say, what it should be."""

BLOCK_SIZE = 16
ROWS = ((1, 1), (1, 17), (1, 300), (1, 2500), (5, 5), (33, 90), (160, 700))
"""Query tokens and context of a mixed step; the longest are cut among programs."""
TINY_ROWS = ((1, 3), (1, 40), (5, 20))
ATTENTION: tuple[tuple[int, int, int, int | None, float | None], ...] = (
    (32, 8, 128, None, None),
    (8, 8, 64, None, None),
    (16, 2, 128, 200, None),
    (8, 4, 256, 96, 50.0),
    (14, 2, 80, None, 30.0),
)
"""Heads, KV heads, head size, window, soft cap."""
TINY_ATTENTION: tuple[tuple[int, int, int, int | None, float | None], ...] = ((4, 2, 16, 12, 30.0),)
PRODUCTS = ((1, 4096, 512), (17, 1000, 328), (200, 512, 1024))
"""Rows, inputs, outputs."""
TINY_PRODUCTS = ((2, 40, 24),)


def check(context: PartContext) -> None:
    """All operations, in both dtypes."""
    for dtype in (torch.bfloat16, torch.float32):
        checks = KernelChecks(context, dtype)
        for operation in (
            checks.attention,
            checks.rotation,
            checks.rotate_and_store,
            checks.eight_bit_cache,
            checks.rms_norm,
            checks.residual_norm,
            checks.products,
            checks.gated_products,
            checks.experts,
            checks.lookups,
        ):
            compare(context, operation, dtype)


def compare(context: PartContext, cases: Callable[[], Iterator[Case]], dtype: torch.dtype) -> None:
    """A row with the worst of an operation's cases."""
    what = f"{cases.__name__.replace('_', ' ')}, {str(dtype).removeprefix('torch.')}"
    with context.guard(what):
        errors = {name: relative_error(got, expected) for name, got, expected in cases()}
        tolerance = TOLERANCE[dtype] * (INTERPRETER_FACTOR if context.device.type == "cpu" else 1)
        # Not `>`: what is not a number is wrong.
        wrong = [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= tolerance]
        worst = max(errors.values(), key=lambda error: math.inf if math.isnan(error) else error)
        row = Row(
            what=what,
            value=worst,
            text=f"{len(errors)} cases, {worst:.1e}",
            against=f"tolerance {tolerance:.0e}",
            ratio=worst / tolerance,
            target=1.0,
            at_most=True,
            error=f"off by {', '.join(wrong)}" if wrong else "",
        )
        context.report(row)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖; infinite where shapes differ."""
    if got.shape != expected.shape:
        return math.inf
    difference = (got.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-30)).item()


class KernelChecks:
    """The checked kernels and the reference, with a generator for their inputs."""

    def __init__(self, context: PartContext, dtype: torch.dtype) -> None:
        self._tiny, self._device, self._dtype = context.tiny, context.device, dtype
        self._generator = torch.Generator(context.device).manual_seed(5)

    def attention(self) -> Iterator[Case]:
        """Decode rows and chunks of prompts together."""
        rows = TINY_ROWS if self._tiny else ROWS
        for heads, kv_heads, head_dim, window, softcap in TINY_ATTENTION if self._tiny else ATTENTION:
            tokens = sum(count for count, _ in rows)
            query = self._random(tokens, heads, head_dim)
            keys, values = (self._cache(rows, kv_heads, head_dim) for _ in range(2))
            results = []
            for kernels, (q, k, v) in self._sides(query, keys, values):
                plan = kernels.plan(paged_step(rows, self._device), BLOCK_SIZE)
                results.append(kernels.attention(q, k, v, plan, scale=head_dim**-0.5, window=window, softcap=softcap))
            got, expected = results
            yield f"{heads}/{kv_heads} heads of {head_dim}, window {window}, soft cap {softcap}", got, expected

    def rotation(self) -> Iterator[Case]:
        """Cosines and sines."""
        positions = torch.arange(0, 20_000, 997, device=self._device)
        frequencies = 1.0 / 10_000 ** (torch.arange(0, 32, device=self._device) / 32)
        sides = [kernels.rotation(positions, frequencies, 1.2) for kernels, _ in self._sides()]
        yield from zip(("cosines", "sines"), *sides, strict=True)

    def rotate_and_store(self) -> Iterator[Case]:
        """Queries, and the whole cache, so that a write to a wrong place is seen."""
        heads, kv_heads, head_dim = (4, 2, 16) if self._tiny else (32, 8, 128)
        rows = TINY_ROWS if self._tiny else ROWS
        tokens = sum(count for count, _ in rows)
        for normalised in (False, True):
            for rotary_dim in (head_dim, head_dim // 2):
                qkv = self._random(tokens, heads + 2 * kv_heads, head_dim)
                keys, values = (self._cache(rows, kv_heads, head_dim) for _ in range(2))
                norms = (self._weight(head_dim), self._weight(head_dim)) if normalised else None
                frequencies = 1.0 / 10_000 ** (torch.arange(0, rotary_dim, 2, device=self._device) / rotary_dim)
                results = []
                for kernels, (x, k, v) in self._sides(qkv, keys, values):
                    plan = kernels.plan(paged_step(rows, self._device), BLOCK_SIZE)
                    rotation = kernels.rotation(plan.metadata.positions, frequencies, 1.0)
                    query = kernels.rotate_and_store(x, rotation, k, v, plan, norms=norms, eps=1e-6)
                    results.append((query, k, v))
                for name, got, expected in zip(("queries", "keys", "values"), *results, strict=True):
                    yield f"{name}, norms {normalised}, {rotary_dim} of {head_dim} turn", got, expected

    def eight_bit_cache(self) -> Iterator[Case]:
        """Keys and values stored with scales; then attention over the same cache by both sides."""
        heads, kv_heads, head_dim = (4, 2, 16) if self._tiny else (32, 8, 128)
        rows = TINY_ROWS if self._tiny else ROWS
        tokens = sum(count for count, _ in rows)
        for stored in self._eight_bit_formats():
            qkv = self._random(tokens, heads + 2 * kv_heads, head_dim)
            cache = self._cache(rows, kv_heads, head_dim).float()
            filled = quantise(cache, stored)
            frequencies = torch.ones(head_dim // 2, device=self._device)
            queries, caches = [], []
            for kernels, (x,) in self._sides(qkv):
                (k, k_scales), (v, v_scales) = ((part.clone() for part in filled) for _ in range(2))
                plan = kernels.plan(paged_step(rows, self._device), BLOCK_SIZE)
                rotation = kernels.rotation(plan.metadata.positions, frequencies, 1.0)
                scales = (k_scales, v_scales)
                query = kernels.rotate_and_store(x, rotation, k, v, plan, norms=None, eps=1e-6, scales=scales)
                queries.append(query)
                caches.append((k, v, scales))
            attended = []
            for (kernels, _), query in zip(self._sides(), queries, strict=True):
                k, v, scales = caches[0]  # both read what the kernels wrote
                plan = kernels.plan(paged_step(rows, self._device), BLOCK_SIZE)
                options = {"scale": head_dim**-0.5, "window": None, "softcap": None}
                attended.append(kernels.attention(query, k, v, plan, **options, scales=scales))
            name = str(stored).removeprefix("torch.")
            yield f"attention over {name}", attended[0], attended[1]
            # A number may lie a rounding away from where the grid of 8 bits changes; as much as that is no fault.
            got, expected = (
                torch.cat((dequantise(k, scales[0], torch.float32), dequantise(v, scales[1], torch.float32)))
                for k, v, scales in caches
            )
            yield f"stored as {name}", expected + (got - expected) / 16, expected

    def _eight_bit_formats(self) -> list[torch.dtype]:
        """Float8 needs Ada or Hopper."""
        float8 = self._device.type == "cpu" or torch.cuda.get_device_capability(self._device) >= (8, 9)
        # The interpreter rounds float8 wrongly where a fraction carries over.
        return [torch.int8, *([torch.float8_e4m3fn] if float8 and self._device.type != "cpu" else [])]

    def residual_norm(self) -> Iterator[Case]:
        """The addition to the residual with the norm that follows."""
        for width in (40, 72) if self._tiny else (1024, 4096, 5000):
            hidden, x, weight = self._random(9, width), self._random(9, width), self._weight(width)
            results = []
            for kernels, (hidden_, x_) in self._sides(hidden, x):
                results.append((kernels.add_norm(hidden_, x_, 0.5, weight, 1e-6), hidden_))
            for name, got, expected in zip(("norm", "sum"), *results, strict=True):
                yield f"{name}, width {width}", got, expected

    def rms_norm(self) -> Iterator[Case]:
        """New tensors, in place, and selected rows."""
        for width in (40, 72) if self._tiny else (1024, 4096, 5000):
            x, weight = self._random(9, width), self._weight(width)
            rows = torch.tensor([7, 0, 3], device=self._device)
            for name, options in (("new", {}), ("in place", {"in_place": True}), ("rows", {"rows": rows})):
                got, expected = (k.rms_norm(i[0], weight, 1e-6, **options) for k, i in self._sides(x))
                yield f"{name}, width {width}", got, expected

    def products(self) -> Iterator[Case]:
        """With a bias, added to a residual, in float32."""
        for rows, inputs, outputs in TINY_PRODUCTS if self._tiny else PRODUCTS:
            x, weight, bias = self._random(rows, inputs), self._random(outputs, inputs), self._random(outputs)
            residual = self._random(rows, outputs)
            results = []
            for kernels, (x_, weight_, bias_, residual_) in self._sides(x, weight, bias, residual):
                plain, biased = kernels.linear(weight_.clone()), kernels.linear(weight_, bias_)
                y, wide = biased(x_), plain.float32(x_).clone()
                plain.add_to(residual_, x_, 0.5)
                results.append((y, wide, residual_))
            for name, got, expected in zip(("with a bias", "float32", "added"), *results, strict=True):
                yield f"{name}, {rows} × {inputs} → {outputs}", got, expected

    def gated_products(self) -> Iterator[Case]:
        """Every activation."""
        for rows, inputs, outputs in TINY_PRODUCTS if self._tiny else PRODUCTS:
            x, weight = self._random(rows, inputs), self._random(2 * outputs, inputs, scale=inputs**-0.5)
            for activation in ("silu", "gelu", "gelu_tanh"):
                got, expected = (k.gated_linear(i[1], None, activation)(i[0]) for k, i in self._sides(x, weight))
                yield f"{activation}, {rows} × {inputs} → {outputs}", got, expected

    def experts(self) -> Iterator[Case]:
        """A mixture of experts, routed by the reference, because a tie may fall either way."""
        count, hidden, width = (3, 24, 16) if self._tiny else (16, 512, 256)
        for tokens in (2,) if self._tiny else (1, 9, 300):
            x, logits = self._random(tokens, hidden), torch.randn(tokens, count, device=self._device)
            gate_up = self._random(count, 2 * width, hidden, scale=hidden**-0.5)
            down = self._random(count, hidden, width, scale=width**-0.5)
            routed = TorchKernels(self._device, torch.float32).route(logits, 2, True)
            got, expected = (
                kernels.experts(inputs[1], inputs[2], "silu")(inputs[0], *routed)
                for kernels, inputs in self._sides(x, gate_up, down)
            )
            yield f"{tokens} tokens", got, expected
            got, expected = (kernels.route(logits, 2, True)[0] for kernels, _ in self._sides())
            yield f"weights of {tokens} tokens", got, expected

    def lookups(self) -> Iterator[Case]:
        """Embedding and argmax; the latter's index must be the very one."""
        table = self._random(300, 64)
        tokens = torch.randint(0, 300, (7,), device=self._device)
        got, expected = (k.embed(k.tied_linear(i[0]), tokens, 2.0) for k, i in self._sides(table))
        yield "embedding", got, expected
        logits = torch.randn(5, 1000 if self._tiny else 151_936, device=self._device)
        logits[0, 17] = logits[0, 400] = 30.0
        got, expected = (k.argmax(logits) for k, _ in self._sides())
        yield "argmax", (got != expected).float() + 1.0, torch.ones_like(expected)

    def _sides(self, *inputs: Tensor) -> Iterator[tuple[Kernels, tuple[Tensor, ...]]]:
        """The checked kernels with copies of the inputs, then the reference with the same in float32."""
        yield load_kernels(self._device, self._dtype), tuple(x.clone() for x in inputs)
        yield (
            TorchKernels(self._device, torch.float32),
            tuple(x.to(torch.float32, copy=True) for x in inputs),
        )

    def _random(self, *shape: int, scale: float = 1.0) -> Tensor:
        wide = torch.randn(shape, generator=self._generator, device=self._device)
        return (wide * scale).to(self._dtype)

    def _weight(self, width: int) -> Tensor:
        """Of a norm."""
        return torch.rand(width, generator=self._generator, device=self._device) + 0.5

    def _cache(self, rows: Sequence[tuple[int, int]], kv_heads: int, head_dim: int) -> Tensor:
        return self._random(kv_heads, blocks_needed(rows, BLOCK_SIZE), BLOCK_SIZE, head_dim)
