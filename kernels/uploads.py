"""Small host arrays that a step needs on its device, in one copy and without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16
"""Bytes; so that kernels may read any array in wide loads."""
IN_FLIGHT = 3
"""Pinned buffers that are filled in turn: the device may be so many uploads behind."""


class Uploads:
    """Arrays of one kind of step, packed side by side.

    The device's copy has a fixed place as long as nothing larger than ever before comes, so what was uploaded is valid
    until the next upload: the copy waits, on the device, for the kernels that were launched before it.
    """

    def __init__(self, device: torch.device, capacity: int = 2**16) -> None:
        """`capacity`: bytes; it grows when an upload needs more."""
        self._device = device
        self._pinned = device.type != "cpu"
        self._next = 0
        self._layout: tuple[tuple[str, tuple[int, ...], np.dtype], ...] | None = None
        self._offsets: list[int] = []
        self._end = 0
        self._tensors: dict[str, Tensor] = {}
        self._allocate(capacity)

    def __call__(self, arrays: Mapping[str, NDArray]) -> dict[str, Tensor]:
        """Copy `arrays` to the device; they may be changed at once. Tensors have the arrays' shapes and dtypes.

        Returns:
            The same tensors as last time if names, shapes and dtypes are the same.
        """
        layout = tuple((name, array.shape, array.dtype) for name, array in arrays.items())
        if layout != self._layout:
            self._arrange(arrays)
            self._layout = layout
        host, event = self._hosts[self._next], self._events[self._next]
        self._next = (self._next + 1) % IN_FLIGHT
        if event is not None:
            event.synchronize()  # three uploads ago: long done, unless the device is that far behind
        memory = host.numpy()
        for array, start in zip(arrays.values(), self._offsets, strict=True):
            memory[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._image[: self._end].copy_(host[: self._end], non_blocking=self._pinned)
        if event is not None:
            event.record()
        return self._tensors

    def _arrange(self, arrays: Mapping[str, NDArray]) -> None:
        """Decide where the arrays lie."""
        self._offsets, self._end = [], 0
        for array in arrays.values():
            self._offsets.append(self._end)
            self._end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if self._end > len(self._image):
            self._allocate(2 * self._end)
        self._tensors = {
            name: self._image[start : start + array.nbytes]
            .view(torch.from_numpy(array.reshape(-1)[:0]).dtype)
            .view(array.shape)
            for (name, array), start in zip(arrays.items(), self._offsets, strict=True)
        }

    def _allocate(self, capacity: int) -> None:
        self._image = torch.empty(capacity, dtype=torch.uint8, device=self._device)
        self._hosts = [torch.empty(capacity, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(IN_FLIGHT)]
        self._events = [torch.cuda.Event() if self._pinned else None for _ in range(IN_FLIGHT)]
