"""Reading weights from files to their places on a device, by several threads.

Files are read with positioned reads of large contiguous ranges, in the order in which they lie in the files. A mapped
file would be read page by page and count as memory of the process; from a disk it takes half as long again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..cluster.errors import CheckpointError
from .checkpoint import Checkpoint, StoredTensor
from .staging import ALIGNMENT, Staging, release_pinned_memory
from .weight_names import TensorSlice

MAX_READERS = 8
"""Readers of one shard. A few fill a GPU's link from the page cache; more keep a disk busy."""
READ_BYTES = 8 * 2**20
"""A read goes up to here where its bytes are not touched again: a GPU's readers pin 2 * 8 * 8 MiB at most, as
pinning takes time."""
CACHE_BYTES = 4 * 2**20
"""A read goes up to here where the CPU works on its bytes, so that they are still in a core's cache."""

REPORT_BYTES = 16 * 2**20
"""Between reports of a reader: each wakes the thread that waits for them, and takes the interpreter from a reader."""


@dataclasses.dataclass(frozen=True, slots=True)
class Read:
    """One contiguous range of a file and its place on the device."""

    name: str
    """Of the tensor."""
    path: Path
    offset: int
    """Of the first byte in the file."""
    shape: tuple[int, ...]
    """Of the elements that are read: whole rows of the tensor."""
    dtype: torch.dtype
    """As stored."""
    columns: slice | None
    """Of the rows, those that are wanted; None: all."""
    target: Tensor
    """Of the shape of what is wanted."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def nbytes_wanted(self) -> int:
        """In the stored dtype."""
        return self.target.numel() * self.dtype.itemsize


def plan_reads(places: Sequence[tuple[TensorSlice, Tensor]], checkpoint: Checkpoint) -> list[Read]:
    """The reads that fill every tensor with its slice, ordered by file and offset.

    Args:
        places: tensors of the slices' shapes, contiguous, on the device and of the dtype that they are to have.

    Raises:
        CheckpointError: a tensor is missing, has another shape or is not floating-point.
    """
    reads = [read for piece, target in places for read in _split(piece, checkpoint.locate(piece), target)]
    return sorted(reads, key=lambda read: (read.path, read.offset))


def _split(piece: TensorSlice, stored: StoredTensor, target: Tensor) -> Iterator[Read]:
    """Reads of whole rows."""
    row_shape = piece.shape[1:]
    row_bytes = math.prod(row_shape) * stored.dtype.itemsize
    columns = None if piece.columns == slice(0, *row_shape) else piece.columns
    converts = target.device.type == "cpu" and target.dtype != stored.dtype
    step = max(1, (CACHE_BYTES if columns is not None or converts else READ_BYTES) // row_bytes)
    for start in range(0, piece.num_rows, step):
        rows = min(step, piece.num_rows - start)
        offset = stored.offset + (piece.rows.start + start) * row_bytes
        part = target[start : start + rows]
        yield Read(piece.name, stored.path, offset, (rows, *row_shape), stored.dtype, columns, part)


def read_weights(
    reads: Sequence[Read], device: torch.device, advance: Callable[[int], None], num_readers: int | None = None
) -> None:
    """Execute the reads; all bytes have arrived on the device on return.

    Args:
        advance: called in this thread with bytes that have been filled since the last call, in the targets' dtypes.
        num_readers: threads; None: by the CPUs that there are, and at least two: one converts while another one reads.

    Raises:
        CheckpointError: names the file and the tensor that could not be read.
    """
    threads = torch.get_num_threads()
    if num_readers is None:
        cpus = len(os.sched_getaffinity(0)) if device.type == "cuda" else threads
        num_readers = min(MAX_READERS, max(2, cpus), len(reads))
    capacity = max((read.nbytes_wanted for read in reads), default=ALIGNMENT)
    work: queue.SimpleQueue[Read] = queue.SimpleQueue()
    for read in reads:
        work.put(read)
    outcomes: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def run(reader: _Reader) -> None:
        torch.set_num_threads(1)  # the readers are the threads; of OpenMP's every one would start a team
        try:
            unreported = 0
            with contextlib.closing(reader), contextlib.suppress(queue.Empty):
                while not stop.is_set():
                    read = work.get_nowait()
                    reader.execute(read)
                    unreported += read.target.nbytes
                    if unreported >= REPORT_BYTES:
                        outcomes.put(unreported)
                        unreported = 0
            outcomes.put(unreported)
        except BaseException as error:
            outcomes.put(error)
        finally:
            outcomes.put(None)

    readers = [_Reader(device, capacity) for _ in range(num_readers)]
    running = [threading.Thread(target=run, args=(reader,), name="weight-reader") for reader in readers]
    failure: BaseException | None = None
    for thread in running:
        thread.start()
    try:
        reading = num_readers
        while reading:
            outcome = outcomes.get()
            if outcome is None:
                reading -= 1
            elif isinstance(outcome, int):
                advance(outcome)
            else:
                failure = failure or outcome
                stop.set()
    finally:
        stop.set()
        for thread in running:
            thread.join()
        torch.set_num_threads(threads)  # a reader's setting is the default of threads to come
        readers.clear()
        running.clear()
        release_pinned_memory()
    if failure is not None:
        raise failure


class _Reader:
    """What one thread needs."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        self._on_host = device.type == "cpu"
        self._staging = Staging(device, capacity)
        self._rows = torch.empty(0, dtype=torch.uint8)
        self._descriptor = -1
        self._path: Path | None = None

    def execute(self, read: Read) -> None:
        """Bring the read's bytes to their target, or on their way to it."""
        if read.columns is not None:
            rows = self._scratch(read.nbytes)
            self._fill(rows, read)
            wanted = rows.view(read.dtype).view(read.shape)[:, read.columns]
            if self._on_host:
                read.target.copy_(wanted)
                return
            host = self._staging.reserve(read.nbytes_wanted).view(read.dtype).view(read.target.shape)
            self._staging.send(host.copy_(wanted), read.target)
        elif self._on_host and read.target.dtype == read.dtype:
            self._fill(read.target.reshape(-1).view(torch.uint8), read)
        else:
            host = self._staging.reserve(read.nbytes)
            self._fill(host, read)
            self._staging.send(host.view(read.dtype).view(read.target.shape), read.target)

    def close(self) -> None:
        """Close the file and wait for the copies."""
        self._close_file()
        self._staging.finish()

    def _scratch(self, nbytes: int) -> Tensor:
        if len(self._rows) < nbytes:
            self._rows = torch.empty(nbytes, dtype=torch.uint8)
        return self._rows[:nbytes]

    def _fill(self, host: Tensor, read: Read) -> None:
        """Read the file's bytes into `host` [nbytes] uint8; other threads run meanwhile."""
        memory, offset = host.numpy().data, read.offset
        try:
            if read.path != self._path:
                self._close_file()
                self._descriptor, self._path = os.open(read.path, os.O_RDONLY | os.O_CLOEXEC), read.path
            while memory:
                count = os.preadv(self._descriptor, [memory], offset)
                if count == 0:
                    raise CheckpointError(f"{read.path}: cannot read {read.name}: the file ends at byte {offset}")
                memory, offset = memory[count:], offset + count
        except OSError as error:
            raise CheckpointError(f"{read.path}: cannot read {read.name}: {error.strerror}") from None

    def _close_file(self) -> None:
        if self._path is not None:
            os.close(self._descriptor)
            self._path = None
