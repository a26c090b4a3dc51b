"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11).

The random number of a draw is a pure function of (seed, position), so neither the batch, nor preemption, nor the
device changes a request's random stream. Both inputs are known on the host before a step begins, so the few numbers
of a step are computed there, for all rows at once, and travel to the device beside the sampling parameters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_ROUNDS = 10


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds of Philox4x32 on N independent blocks.

    Args:
        counter: [4, N] uint64, each below 2**32.
        key: [2, N] uint64, each below 2**32.

    Returns:
        [4, N] uint64, each below 2**32: the four random words of every block.
    """
    even, odd = counter[0::2], counter[1::2]  # words (0, 2) and (1, 3)
    for _ in range(_ROUNDS):
        product = even * _MULTIPLIERS  # 32 x 32 bits fit in 64
        high, low = product >> _SHIFT32, product & _MASK32
        even, odd = high[::-1] ^ odd ^ key, low[::-1]
        key = (key + _WEYL) & _MASK32
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One uniform number in [0, 1) with 53 random bits for every (seed, position).

    Args:
        seeds: [N] uint64, the requests' seeds: Philox's key.
        positions: [N] int64, the position in its sequence of the token to be drawn: Philox's counter.

    Returns:
        [N] float64.
    """
    seeds, positions = seeds.astype(np.uint64), positions.astype(np.uint64)
    counter = np.zeros((4, len(seeds)), dtype=np.uint64)
    counter[0], counter[1] = positions & _MASK32, positions >> _SHIFT32
    words = philox4x32(counter, np.stack((seeds & _MASK32, seeds >> _SHIFT32)))
    bits = (words[0] >> np.uint64(5) << np.uint64(26)) | (words[1] >> np.uint64(6))  # 27 + 26 bits
    return bits.astype(np.float64) * 2.0**-53
