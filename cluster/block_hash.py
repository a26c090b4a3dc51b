"""The chained hashes that name a full KV block: equal hash, equal keys and values.

The hash of a block covers its tokens and, through its parent's hash, everything before it; the chain begins with the
request's cache salt. Schedulers find cached blocks by the whole hash. Ingresses, which only estimate where a prefix is
warm, keep `short_hash`: a collision there costs a wrong guess and never a wrong answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16
SHORT_BITS = 60
"""Of a short hash: the largest integer that CPython keeps in two digits (32 bytes)."""
_SHORT_MASK = (1 << SHORT_BITS) - 1


def extend_block_hashes(hashes: list[bytes], tokens: Sequence[int], block_size: int, salt: str) -> None:
    """Append the hashes of the full blocks of `tokens` that are not in `hashes` yet."""
    done, full = len(hashes) * block_size, len(tokens) // block_size * block_size
    if done >= full:
        return
    parent = hashes[-1] if hashes else blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()
    content, size = array("I", tokens[done:full]).tobytes(), 4 * block_size
    for start in range(0, len(content), size):
        parent = blake2b(parent + content[start : start + size], digest_size=DIGEST_BYTES).digest()
        hashes.append(parent)


def short_hash(digest: bytes) -> int:
    """The first 60 bits of a block's hash."""
    return int.from_bytes(digest[:8], "little") & _SHORT_MASK


def short_hashes(digests: Sequence[bytes]) -> NDArray[np.int64]:
    """`short_hash` of each."""
    halves = np.frombuffer(b"".join(digests), "<i8").reshape(-1, DIGEST_BYTES // 8)
    return halves[:, 0].astype(np.int64, copy=False) & _SHORT_MASK


def short_block_hashes(tokens: Sequence[int], block_size: int, salt: str) -> list[int]:
    """Short hashes of the full blocks of `tokens`, first block first."""
    hashes: list[bytes] = []
    extend_block_hashes(hashes, tokens, block_size, salt)
    return short_hashes(hashes).tolist()
