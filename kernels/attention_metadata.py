"""The description of a mixed batch that every attention kernel takes."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


@dataclasses.dataclass(slots=True)
class AttentionMetadata:
    """Rows of one step: T query tokens in R rows; rows with exactly one query token come first.

                  row 0   row 1   row 2
        tokens   [ a41  |  b9   | c0 c1 c2 … c63 ]        T = 66, R = 3, decode_rows = 2
        K/V of token i is written to flat cache slot `slot_mapping[i]` = block id * block size + offset,
        then row r attends to the first `context_lens[r]` tokens behind `block_tables[r]`, causally.

    Device tensors are for kernels; the lists are the same numbers on the host, so that a kernel that loops over
    rows never synchronises with the device.
    """

    positions: Tensor
    """[T] int64: position of every query token in its sequence."""
    slot_mapping: Tensor
    """[T] int64."""
    query_start: Tensor
    """[R + 1] int32: offsets of the rows in the T tokens."""
    context_lens: Tensor
    """[R] int32: tokens in the cache after this step, the row's query tokens included."""
    block_tables: Tensor
    """[R, max blocks of any row] int32, padded with the null block."""
    decode_rows: int
    counts: list[int]
    """Query tokens per row."""
    contexts: list[int]
    """`context_lens` on the host."""
    work: Any = None
    """What the kernels asked to be uploaded with the step (`gpu/paged_attention.py`: `StepWork`), where its rows are
    those of `block_tables` that the work names, and nothing but positions, slots and block tables is read besides.
    None: they upload it themselves."""
