"""The way of a reader's bytes to a device: host buffers that it fills and that asynchronous copies empty."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; for views of any dtype, and for wide copies."""
NUM_BUFFERS = 2
"""One is filled while the other one's bytes are on their way."""


class Staging:
    """Buffers of one reader, and on a GPU its stream; to be used by one thread at a time.

        reader     fill A ──▶ fill B ──▶ fill A (when its bytes have left) ──▶ …
        stream              copy A ──▶ copy B ──▶ …

    A GPU's buffers are pinned, since only from such memory it copies by itself. On a CPU the copies are done at once.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        """`capacity`: bytes of one buffer, at least those of the largest reservation."""
        self._device = device
        self._capacity = -(-capacity // ALIGNMENT) * ALIGNMENT
        on_gpu = device.type == "cuda"
        self._buffers = [torch.empty(self._capacity, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(NUM_BUFFERS)]
        self._left = [torch.cuda.Event(blocking=True) if on_gpu else None for _ in self._buffers]
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        if self._stream is not None:
            # The places that are written may be memory that kernels launched before still use.
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._current = 0
        self._used = 0

    def reserve(self, nbytes: int) -> Tensor:
        """Host memory to be filled and then given to `send`: [nbytes] uint8.

        It is this caller's until `NUM_BUFFERS` buffers of other reservations have followed.
        """
        assert nbytes <= self._capacity, "the largest reservation was to be known"
        if self._used + nbytes > self._capacity:
            self._next_buffer()
        begin, self._used = self._used, self._used + -(-nbytes // ALIGNMENT) * ALIGNMENT
        return self._buffers[self._current][begin : begin + nbytes]

    def send(self, host: Tensor, target: Tensor) -> None:
        """Copy `host`, a contiguous view of reserved memory, to `target`, of the same shape on the device.

        Another dtype is made on the device.
        """
        with self._on_stream():
            if host.dtype != target.dtype:
                host = host.to(self._device, non_blocking=True)
            target.copy_(host, non_blocking=True)

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        if self._stream is not None:
            self._stream.synchronize()

    def _next_buffer(self) -> None:
        left = self._left[self._current]
        if left is not None:
            left.record(self._stream)
        self._current = (self._current + 1) % NUM_BUFFERS
        self._used = 0
        left = self._left[self._current]
        if left is not None:
            left.synchronize()  # returns at once before the first record

    def _on_stream(self) -> AbstractContextManager:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def release_pinned_memory() -> None:
    """Give pinned memory that is no longer used back to the system; torch would keep it for the next one who asks."""
    release = getattr(torch.accelerator, "empty_host_cache", None)  # not in every torch that we run on
    if release is not None and torch.cuda.is_available():
        release()
