"""Products with quantised weights against their meaning, `kernels/quantised_linear.py`; see `kernel_check.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ....kernels.backend import load_kernels
from ....kernels.interface import Kernels
from ....kernels.torch_kernels import TorchKernels
from .kernel_check import Case, compare
from .part import PartContext
from .random_weights import random_weight

Format = tuple[str, dict[str, Any]]
"""A name, and how `random_weight` makes such a weight."""
PRODUCTS = ((1, 4096, 512), (17, 1024, 328), (64, 512, 1024), (200, 1536, 512))
"""Rows, inputs, outputs."""
TINY_PRODUCTS = ((2, 64, 24),)
SIXTEEN_BITS: tuple[Format, ...] = (
    ("int4, groups of 128", {}),
    ("int4, groups of 32, zeros", {"group_size": 32, "zeros": True}),
    ("int4, groups of 64", {"group_size": 64}),
    ("int4, rows", {"group_size": 0}),
    ("int8, groups of 128, zeros", {"bits": 8, "zeros": True}),
    ("float8, rows", {"bits": 8, "group_size": 0, "floats": True}),
)
"""Weights that meet activations of 16 bits."""
EIGHT_BITS: tuple[Format, ...] = (
    ("int8", {"bits": 8, "group_size": 0, "activations": torch.int8}),
    ("int8, groups of 128", {"bits": 8, "activations": torch.int8}),
    ("float8", {"bits": 8, "group_size": 0, "floats": True, "activations": torch.float8_e4m3fn}),
    ("float8, groups of 128", {"bits": 8, "floats": True, "activations": torch.float8_e4m3fn}),
)


def check(context: PartContext) -> None:
    """All operations, in both dtypes."""
    for dtype in (torch.bfloat16, torch.float32):
        checks = QuantisedChecks(context, dtype)
        for operation in (checks.quantised_products, checks.eight_bit_products, checks.quantised_experts):
            compare(context, operation, dtype)


class QuantisedChecks:
    """The checked kernels and the reference, on the same weights."""

    def __init__(self, context: PartContext, dtype: torch.dtype) -> None:
        self._tiny, self._device, self._dtype = context.tiny, context.device, dtype

    def quantised_products(self) -> Iterator[Case]:
        """Few and many rows, with a bias, added, in float32, gated."""
        for index, (name, options) in enumerate(self._some(SIXTEEN_BITS)):
            yield from self._products(name, options, every_way=index == 0)

    def eight_bit_products(self) -> Iterator[Case]:
        """The same with activations that are rounded to 8 bits."""
        for index, (name, options) in enumerate(self._some(EIGHT_BITS)):
            yield from self._products(name, options, every_way=index == 0)

    def quantised_experts(self) -> Iterator[Case]:
        """A mixture of experts, routed by the reference."""
        count, hidden, width = (3, 64, 32) if self._tiny else (16, 512, 256)
        for name, options in self._some(SIXTEEN_BITS[:2]):
            gate_up, down = (
                [random_weight(*shape, self._device, **options) for _ in range(count)]
                for shape in ((2 * width, hidden), (hidden, width))
            )
            for tokens in (2,) if self._tiny else (1, 9, 300):
                x = torch.randn(tokens, hidden, device=self._device).to(self._dtype)
                logits = torch.randn(tokens, count, device=self._device)
                routed = TorchKernels(self._device, torch.float32).route(logits, 2, True)
                got, expected = (
                    kernels.experts(gate_up, down, "silu")(x.to(dtype), *routed) for kernels, dtype in self._sides()
                )
                yield f"{name}, {tokens} tokens", got, expected

    def _some(self, formats: Sequence[Format]) -> Sequence[Format]:
        """All formats where a GPU serves models, in 16 bits; the first elsewhere."""
        return formats if self._dtype.itemsize == 2 and not self._tiny else formats[:1]

    def _products(self, name: str, options: dict[str, Any], *, every_way: bool) -> Iterator[Case]:
        """`every_way`: also what differs in what is done with a product only, and tiles of every size."""
        shapes = TINY_PRODUCTS if self._tiny else PRODUCTS if every_way else PRODUCTS[::3]
        for rows, inputs, outputs in shapes:
            weight = random_weight(outputs, inputs, self._device, **options)
            x = torch.randn(rows, inputs, device=self._device).to(self._dtype)
            bias = torch.randn(outputs, device=self._device).to(self._dtype)
            residual = torch.randn(rows, outputs, device=self._device).to(self._dtype)
            results = []
            for kernels, dtype in self._sides():
                wide = x.to(dtype)
                gated = kernels.gated_linear(weight, None, "silu")(wide)
                parts = {"with a bias": kernels.linear(weight, bias.to(dtype))(wide), "gated": gated}
                if every_way:
                    plain, added = kernels.linear(weight), residual.to(dtype, copy=True)
                    plain.add_to(added, wide, 0.5)
                    parts |= {"float32": plain.float32(wide).clone(), "added": added}
                results.append(parts)
            for part, expected in results[1].items():
                yield f"{name}, {part}, {rows} × {inputs} → {outputs}", results[0][part], expected

    def _sides(self) -> Iterator[tuple[Kernels, torch.dtype]]:
        """The checked kernels and the reference, each with the dtype that it computes in."""
        yield load_kernels(self._device, self._dtype), self._dtype
        yield TorchKernels(self._device, torch.float32), torch.float32
