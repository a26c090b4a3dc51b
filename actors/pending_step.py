"""A step that the device is still working on, while the host prepares the next."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..cluster.step import StepResult


class HostCopies:
    """Copies of results on the host, for as many steps as may be under way.

    Sampled tokens go to pinned memory that is allocated once: asking for some in every step may have to wait for the
    device, after a recording has emptied torch's cache of it.
    """

    def __init__(self, device: torch.device, max_num_seqs: int, *, steps: int) -> None:
        """`steps`: whose results may not have been read yet, the one being launched included."""
        self._pinned = device.type == "cuda"
        self._tokens = [torch.empty(max_num_seqs, dtype=torch.int64, pin_memory=self._pinned) for _ in range(steps)]
        self._next = 0

    def start(self, tensor: Tensor) -> Tensor:
        """A copy that is complete when the device's stream has got there; the caller waits for that."""
        if tensor.dtype == torch.int64 and tensor.dim() == 1:
            target = self._tokens[self._next][: len(tensor)]
            self._next = (self._next + 1) % len(self._tokens)
        else:  # log-probabilities, which few ask for
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        return target.copy_(tensor, non_blocking=True)


class StepClock:
    """When steps begin and end, on the device and on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last_end = 0.0

    def start(self) -> StepTimer:
        """Now, on the host; the device begins at `StepTimer.begin`."""
        return StepTimer(self, self._device)

    def ended(self, start: float) -> float:
        """Seconds that a step has kept the shard, which worked on the one before until that ended."""
        now = time.perf_counter()
        seconds = now - max(start, self._last_end)
        self._last_end = now
        return seconds


class StepTimer:
    """The times of one step."""

    def __init__(self, clock: StepClock, device: torch.device) -> None:
        self._clock = clock
        self._start = time.perf_counter()
        cuda = device.type == "cuda"
        # Waiting for the end must leave the processor to the thread that prepares the next step.
        self._events = [torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2)] if cuda else []
        self._host = [0.0, 0.0]

    def begin(self) -> None:
        """The inputs are on their way; what follows is the model's work."""
        self._mark(0)

    def end(self) -> None:
        """All of the step has been launched."""
        self._mark(1)

    def wait(self) -> tuple[float, float]:
        """Wait for the end; (seconds of the model's work, seconds of the whole step)."""
        if not self._events:
            return self._host[1] - self._host[0], self._clock.ended(self._start)
        begin, end = self._events
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3, self._clock.ended(self._start)

    def _mark(self, index: int) -> None:
        if self._events:
            self._events[index].record()
        else:
            self._host[index] = time.perf_counter()


class PendingStep:
    """A launched step of the output shard."""

    def __init__(self, timer: StepTimer, finish: Callable[[float, float], StepResult]) -> None:
        """`finish` makes the result from the times and what was copied to the host."""
        self._timer = timer
        self._finish = finish

    def result(self) -> StepResult:
        """Wait for the device; in the order of the launches."""
        return self._finish(*self._timer.wait())
