"""Products with quantised weights beside the library's in bfloat16, in the shapes of an 8 B model.

The ratio is how many times as fast as the library's product they are; see `timing.py` for what is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ....kernels.backend import load_kernels
from ....kernels.gpu.activation import gated_activation
from ....kernels.quantised_weight import QuantisedWeight
from .part import PartContext, Row, with_unit
from .random_weights import random_weight
from .timing import free_memory, median_seconds, sets_beyond_cache

DTYPE = torch.bfloat16
SHAPES = ((6144, 4096, False), (4096, 4096, False), (28_672, 4096, True), (4096, 14_336, False))
"""Rows of the weight, inputs, gated: all products of a layer of Llama-3-8B."""
TINY_SHAPES = ((32, 64, True),)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
TINY_ROWS = (1,)
FEW_ROWS = 16
FEW_ROWS_TARGET = 3.0
"""Four bits are read up to here, a quarter of the bytes."""
EIGHT_BIT_ROWS = (1, 16, 64, 1024)
REPEATS = 7
FOUR_BITS: tuple[str, dict[str, Any]] = ("int4 g128", {})
EIGHT_BITS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("W8A8 int8", {"bits": 8, "group_size": 0, "activations": torch.int8}),
    ("W8A8 float8", {"bits": 8, "floats": True, "activations": torch.float8_e4m3fn}),
)


def measure(context: PartContext) -> None:
    """All points."""
    points = QuantisedPoints(context)
    shapes = TINY_SHAPES if context.tiny else SHAPES
    for shape in shapes:
        points.products(*shape, *FOUR_BITS, TINY_ROWS if context.tiny else ROWS, FEW_ROWS_TARGET)
    for name, options in EIGHT_BITS:
        for shape in shapes if context.tiny else SHAPES[2:3]:
            points.products(*shape, name, options, TINY_ROWS if context.tiny else EIGHT_BIT_ROWS)


class QuantisedPoints:
    """Measures and reports."""

    def __init__(self, context: PartContext) -> None:
        self._context, self._device = context, context.device

    def products(
        self,
        outputs: int,
        inputs: int,
        gated: bool,
        name: str,
        options: dict[str, Any],
        all_rows: tuple[int, ...],
        target: float | None = None,
    ) -> None:
        """A weight with several numbers of rows; `target`: of few rows."""
        device = self._device
        what = f"{name} {inputs:,} → {outputs:,}{' gated' if gated else ''}"
        free_memory(device)
        with self._context.guard(what):
            kernels = load_kernels(device, DTYPE)

            def new_weight() -> QuantisedWeight:
                return random_weight(outputs, inputs, device, **options)

            size = new_weight().nbytes
            ours: list[Callable[[Tensor], Tensor]] = [
                kernels.gated_linear(new_weight(), None, "silu") if gated else kernels.linear(new_weight())
                for _ in range(sets_beyond_cache(size, device))
            ]
            dense = [
                torch.randn(outputs, inputs, dtype=DTYPE, device=device)
                for _ in range(sets_beyond_cache(outputs * inputs * DTYPE.itemsize, device))
            ]
            library: list[Callable[[Tensor], Tensor]] = [
                functools.partial(library_product, weight, gated) for weight in dense
            ]
            for rows in all_rows:
                x = torch.randn(rows, inputs, dtype=DTYPE, device=device)
                seconds, beside = self._seconds(ours, x), self._seconds(library, x)
                self._context.report(
                    Row(
                        what=f"{what}, {rows:,} rows",
                        value=seconds,
                        unit="s",
                        text=f"{with_unit(seconds, 's')} {with_unit(size / seconds, 'B/s')} of weights",
                        against=f"library's bf16 {with_unit(beside, 's')}",
                        ratio=beside / seconds,
                        target=target if rows <= FEW_ROWS else None,
                    )
                )

    def _seconds(self, products: list[Callable[[Tensor], Tensor]], x: Tensor) -> float:
        calls = [functools.partial(product, x) for product in products]
        return median_seconds(calls, self._device, repeats=REPEATS).seconds


def library_product(weight: Tensor, gated: bool, x: Tensor) -> Tensor:
    """What is compared with."""
    y = functional.linear(x, weight)
    return gated_activation(y, "silu") if gated else y
