"""The random number of a draw, bit for bit that of `kernels/philox.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(seed, position):
    """In [0, 1) with 53 random bits, float64; Philox4x32-10 keyed by `seed`, counting `position`, both int64.

    Triton's generator has the rounds and constants of the paper; only which words are used differs from `tl.rand`.
    """
    low = position.to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = low & 0
    first, second, _third, _fourth = tl.philox(seed, low, high, zero, zero)
    bits = ((first >> 5).to(tl.int64) << 26) | (second >> 6).to(tl.int64)  # 27 + 26 bits
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2**-53
