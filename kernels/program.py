"""A step of the compiled kernels as one call.

A decode step of a small model takes some ten milliseconds in more than a hundred kernels. Called one by one from
Python, each costs several microseconds, wakes a team of threads, and waits for the interpreter lock behind whoever has
it. So the decoder calls its kernels once, to be recorded, and every step then runs the recorded list:

    [ norm · product · rotate · attention · product+add · norm · gated product · product+add · norm · … ]
                                            one shard: a single call
    [ norm · … · product ] all-reduce [ add · norm · … ] all-reduce [ add · … ]
                                            tensor parallel: a call between any two all-reduces

Recorded kernels hold the addresses of their tensors. These have room for the largest step; how many rows a step has is
told when it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .attention_metadata import AttentionMetadata
from .interface import Linear, Plan
from .native_library import Operation, OperationList, Step
from .native_linear import NativeLinear

CACHE_LINE = 64


def spread_stride(width: int, dtype: torch.dtype) -> int:
    """Elements from one row to the next so that many rows side by side are spread over all sets of the first-level
    cache: an odd number of lines. (Rows of 2 KiB, 32 at a time, would share two sets of eight lines.)"""
    lines = -(-width * dtype.itemsize // CACHE_LINE)
    return (lines | 1) * CACHE_LINE // dtype.itemsize


class NativePlan:
    """The step as the compiled kernels take it; what `metadata` holds must stay as it is until the step has run."""

    def __init__(self, metadata: AttentionMetadata, tokens: Tensor | None = None) -> None:
        self.metadata = metadata
        tables = metadata.block_tables
        assert tables.is_contiguous()
        assert tables.dtype == metadata.context_lens.dtype == metadata.query_start.dtype == torch.int32
        assert metadata.slot_mapping.dtype == torch.int64
        self.step = Step(
            metadata.slot_mapping.data_ptr(),
            metadata.query_start.data_ptr(),
            metadata.context_lens.data_ptr(),
            tables.data_ptr(),
            len(metadata.slot_mapping),
            len(metadata.counts),
            metadata.decode_rows,
            tables.shape[1],
            torch.get_num_threads(),
            None if tokens is None else tokens.data_ptr(),
            metadata.positions.data_ptr(),
        )


class NativeProgram:
    """See `interface.Program`."""

    def __init__(self, max_rows: int, target: Callable[[NativeProgram | None], None]) -> None:
        """`target` tells the kernels which program they record to."""
        self.max_rows = max_rows
        self._target = target
        self._parts: list[OperationList | Callable[[int], None]] = []
        self._open: list[Operation] = []
        self._kept: list[Tensor] = []
        self._temporaries: list[Tensor] = []
        self._next_temporary = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """See `interface.Program`."""
        self._target(self)
        try:
            yield
        finally:
            self._target(None)
        self._close_list()
        self._kept += self._temporaries

    def buffer(self, width: int, dtype: torch.dtype) -> Tensor:
        """See `interface.Program`."""
        buffer = torch.zeros(self.max_rows, width, dtype=dtype)
        self._kept.append(buffer)
        return buffer

    def plan(self) -> NativePlan:
        """See `interface.Program`."""
        none = torch.zeros(1, dtype=torch.int32)
        return NativePlan(AttentionMetadata(none.long(), none.long(), none, none, none[None], 0, [], []))

    def run(self, plan: Plan) -> None:
        """See `interface.Program`."""
        assert isinstance(plan, NativePlan)
        self._run(plan.step)

    def run_rows(self, rows: int) -> None:
        """See `interface.Program`."""
        self._run(Step(rows=rows, threads=torch.get_num_threads()))

    def can_record(self, product: Linear) -> bool:
        """See `interface.Program`."""
        return isinstance(product, NativeLinear)

    def _run(self, step: Step) -> None:
        assert step.rows <= self.max_rows
        for part in self._parts:
            if isinstance(part, OperationList):
                part.run(step)
            else:
                part(step.rows)

    def begin_layer(self) -> None:
        """The next layer may overwrite the temporaries of this one."""
        self._next_temporary = 0

    def temporary(self, width: int, dtype: torch.dtype, *, spread: bool = False) -> Tensor:
        """[max_rows, width], the kernels' own until the next layer begins.

        Args:
            spread: the rows are `spread_stride` apart: for what a product reads.
        """
        place = self._next_temporary
        self._next_temporary += 1
        stride = spread_stride(width, dtype) if spread else width
        size = self.max_rows * stride * dtype.itemsize
        if place == len(self._temporaries):
            self._temporaries.append(torch.empty(0, dtype=torch.uint8))
        if len(self._temporaries[place]) < size:
            self._kept.append(self._temporaries[place])
            self._temporaries[place] = torch.empty(size, dtype=torch.uint8)
        return self._temporaries[place][:size].view(dtype).view(self.max_rows, stride)[:, :width]

    def append(self, operation: Operation, *tensors: Tensor | None) -> None:
        """Record an operation on `tensors`, which are kept as long as the program."""
        self._open.append(operation)
        self._kept += [tensor for tensor in tensors if tensor is not None]

    def append_on_host(self, function: Callable[[Tensor], Tensor], x: Tensor, out: Tensor) -> None:
        """Record a call of `function` on the first rows of `x`, whose result goes to `out`."""
        self._close_list()

        def call(rows: int) -> None:
            source = x[:rows]
            target = source if out is x else out[:rows]
            result = function(source)
            if target is not source:
                target.copy_(result)

        self._parts.append(call)

    def _close_list(self) -> None:
        if self._open:
            self._parts.append(OperationList(self._open))
            self._open = []
