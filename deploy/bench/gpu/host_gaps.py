"""How long the device waits for the host while the engine decodes.

Taken from the device's own timeline, as torch's profiler records it. The pauses of about a microsecond between
dependent kernels of a recorded step are no fault of the host: only longer ones count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

GAP_MICROSECONDS = 5.0
"""A shorter pause between two kernels is not a gap."""
STEADY = (0.4, 0.95)
"""Part of a run in which all its requests decode: after the prompts, before the last step."""


@dataclasses.dataclass(frozen=True)
class DeviceTimeline:
    """What the device did within a span."""

    span_us: float
    gaps_us: float
    """In pauses longer than `GAP_MICROSECONDS`."""
    idle_us: float
    """In all pauses."""

    @property
    def gap_share(self) -> float:
        """Of the span, 0 to 1."""
        return self.gaps_us / self.span_us


def record(run: Callable[[], object]) -> DeviceTimeline:
    """The device's timeline while `run` runs, in its steady part.

    Raises:
        RuntimeError: the profiler has seen nothing on the device.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    intervals = device_intervals(profiler.events() or ())
    if not intervals:
        raise RuntimeError("the profiler has recorded nothing on the device")
    return steady_timeline(intervals)


def device_intervals(events: Iterable[Any]) -> list[tuple[float, float]]:
    """(begin, end) in microseconds of everything that ran on the device, in order."""
    on_device = (event for event in events if event.device_type.name == "CUDA")
    return sorted((event.time_range.start, event.time_range.end) for event in on_device)


def steady_timeline(intervals: list[tuple[float, float]], part: tuple[float, float] = STEADY) -> DeviceTimeline:
    """Pauses within `part` of the time from the first beginning to the last end.

    Args:
        intervals: as `device_intervals` gives them; several streams may overlap.
    """
    first, last = intervals[0][0], max(end for _, end in intervals)
    begin, end = (first + share * (last - first) for share in part)
    reached, gaps, idle = begin, 0.0, 0.0
    for start, stop in [*intervals, (end, end)]:
        pause = min(start, end) - reached
        if pause > 0:
            idle += pause
            gaps += pause if pause > GAP_MICROSECONDS else 0.0
        reached = max(reached, stop)
        if reached >= end:
            break
    return DeviceTimeline(end - begin, gaps, idle)
