"""The matrix product inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter takes the bits of bfloat16 numbers for integers when it multiplies matrices."""


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32.

    Args:
        PRECISION: of float32 operands: "ieee" or "tf32".
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc, input_precision="ieee")
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)
