"""What the device can do at most: bytes that it copies and products of bfloat16 matrices that it computes per second.

Everything else in the table is a fraction of these, measured on the same device minutes before.
"""

from __future__ import annotations

import torch

from .part import PartContext, Row, with_unit
from .timing import free_memory, median_seconds

COPY_BYTES = 2**31
MATRIX_SIZE = 8192
TINY_COPY_BYTES, TINY_MATRIX_SIZE = 2**20, 128
COPY, MATRIX = "copy_bandwidth", "matrix_rate"
"""Keys of the two ceilings: bytes/s, read and written counted both, and FLOP/s."""


def measure(context: PartContext) -> None:
    """Both ceilings."""
    with context.guard("device-to-device copy"):
        bandwidth = copy_bandwidth(context.device, TINY_COPY_BYTES if context.tiny else COPY_BYTES)
        context.report(Row(what="copy on the device, read + written", key=COPY, value=bandwidth, unit="B/s"))
    free_memory(context.device)
    with context.guard("bf16 matrix product"):
        size = TINY_MATRIX_SIZE if context.tiny else MATRIX_SIZE
        rate = matrix_rate(context.device, size)
        context.report(Row(what=f"bf16 product, {size}³, random data", key=MATRIX, value=rate, unit="FLOP/s"))


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes/s, read and written counted both, of copying `size` random bytes."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds([lambda: target.copy_(source)], device).seconds


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of a product of two square matrices of random bfloat16 numbers."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_seconds([lambda: torch.mm(a, b, out=out)], device).seconds


def of_bandwidth(context: PartContext, what: str, moved: float, seconds: float, target: float | None = None) -> Row:
    """A row about `moved` bytes in `seconds`."""
    rate, ceiling = moved / seconds, context.known(COPY)
    return Row(
        what=what,
        value=rate,
        unit="B/s",
        text=f"{with_unit(rate, 'B/s')} {with_unit(seconds, 's')}",
        against=f"copy {with_unit(ceiling, 'B/s')}" if ceiling else "",
        ratio=rate / ceiling if ceiling else None,
        target=target,
    )


def of_matrix_rate(context: PartContext, what: str, flops: float, seconds: float, target: float | None = None) -> Row:
    """A row about `flops` floating-point operations in `seconds`."""
    rate, ceiling = flops / seconds, context.known(MATRIX)
    return Row(
        what=what,
        value=rate,
        unit="FLOP/s",
        text=f"{with_unit(rate, 'FLOP/s')} {with_unit(seconds, 's')}",
        against=f"matrix {with_unit(ceiling, 'FLOP/s')}" if ceiling else "",
        ratio=rate / ceiling if ceiling else None,
        target=target,
    )
