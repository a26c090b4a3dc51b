"""Decode steps as CUDA graphs: the model's few hundred kernels of a step are launched as one.

A graph is recorded for every one of a few batch sizes; a step takes the smallest that holds its rows, and the rows
that are left write to the null block. What changes from step to step (rows, block ids, who attends to what) lies in
tensors of fixed place and size, which are uploaded before the graph is replayed.

    upload ─▶ [ prepare ─ embed ─ layers ] ─▶ logits ─▶ sample ─▶ record
                       one graph

Logits are left out because every graph keeps its output: hidden states of all sizes are some megabytes, logits
gigabytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.uploads import ALIGNMENT, Uploads

LARGEST = 512
"""Larger batches are launched kernel by kernel: each of them works long enough."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to record, ascending; the last is `max_num_seqs` or `LARGEST`. Up to 8 they are powers of two, then
    multiples of 8, of 16 from 64 on and of 32 from 256 on."""
    last = min(max_num_seqs, LARGEST)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, LARGEST + 1, 32)]
    return [*(size for size in sizes if size < last), last]


class Replay:
    """One recorded step. On a CPU, where there are no graphs, it is the function itself."""

    def __init__(
        self, uploads: Uploads, inputs: dict[str, Tensor], function: Callable[[dict[str, Tensor]], Tensor]
    ) -> None:
        self._output: Tensor | None = None
        self._uploads, self._inputs = uploads, inputs
        self._function: Callable[[dict[str, Tensor]], Tensor] | None = function
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, pool: Any) -> None:
        """Record the function into the memory of `pool`, torch's handle. It has run before, so that all it needs is
        compiled and allocated."""
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, weights of another replica) may call CUDA meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            assert self._function is not None
            self._output = self._function(self._inputs)
        self._function = None  # which refers to the runner, and the runner to this

    def run(self, arrays: Mapping[str, NDArray]) -> tuple[Tensor, dict[str, Tensor]]:
        """Upload the inputs and run; output and inputs are valid until the next run of any replay."""
        inputs = self._uploads(arrays)
        if self._function is not None:
            return self._function(inputs), inputs
        assert inputs is self._inputs, "the graph reads from where it was recorded"
        assert self._graph is not None
        self._graph.replay()
        assert self._output is not None
        return self._output, inputs


class DecodeGraphs:
    """The replays of one runner, which share their memory: no two run at once."""

    def __init__(
        self,
        sizes: list[int],
        arrays: Callable[[int], Mapping[str, NDArray]],
        function: Callable[[int, dict[str, Tensor]], Tensor],
        device: torch.device,
    ) -> None:
        """
        Args:
            arrays: inputs of a step of so many rows; their shapes depend on the number only.
            function: the step, from the number of rows and the uploaded inputs to its output.
        """
        self.sizes = sizes
        self._replays: dict[int, Replay] = {}
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        for size in reversed(sizes):  # the largest first: the others fit into what it has allocated
            example = arrays(size)
            uploads = Uploads(device, capacity=sum(array.nbytes + ALIGNMENT for array in example.values()))
            replay = Replay(uploads, uploads(example), functools.partial(function, size))
            replay.run(example)
            if pool is not None:
                torch.cuda.synchronize(device)
                replay.capture(pool)
            self._replays[size] = replay

    def fitting(self, rows: int) -> int | None:
        """The size that a step of so many rows takes; None: there is none."""
        return next((size for size in self.sizes if size >= rows), None)

    def run(self, size: int, arrays: Mapping[str, NDArray]) -> tuple[Tensor, dict[str, Tensor]]:
        """Run a step of `size` rows with these inputs; output and inputs on the device, valid until the next run."""
        return self._replays[size].run(arrays)


def pad_rows(rows: NDArray[np.int32], size: int, padding: NDArray[np.int32]) -> NDArray[np.int32]:
    """`rows` and then `padding`, `size` in all; the first token of padding row i is token i."""
    result = np.tile(padding, (size, 1))
    result[: len(rows)] = rows
    result[:, 3] = np.arange(size)
    return result
