"""How long a device takes for a call, without what the host needs to launch it."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]

GRAPH_SECONDS = 2e-3
"""A recorded graph holds so much work, so that the clock's resolution and the graph's launch do not matter."""
GRAPH_CALLS = 512
"""It holds no more calls than that."""
CACHE_FACTOR = 3
"""Rotated inputs are together this many times as large as the device's cache."""
MAX_SETS = 64
CPU_REPEATS = 3
"""On a CPU nothing is measured but that the program works."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """The median of a call."""

    seconds: float
    recorded: bool
    """Whether it was replayed from a CUDA graph; if not, the host's launching may be part of the time."""


def sets_beyond_cache(bytes_per_call: float, device: torch.device) -> int:
    """Sets of inputs to rotate, so that no call finds its inputs in the cache because the call before had the same."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_SETS, math.ceil(CACHE_FACTOR * cache / bytes_per_call)))


def median_seconds(calls: Sequence[Call], device: torch.device, *, repeats: int = 15) -> Timing:
    """The median time of one call, `calls` being the same work on different inputs, run in turn.

    On a GPU the calls are recorded as a CUDA graph, as the engine runs them, and the graph is timed with events. What
    cannot be recorded is launched from the host and timed with events all the same.
    """
    for call in calls:
        call()  # compiles, and allocates what is kept
    if device.type != "cuda":
        return Timing(statistics.median(_clock(calls) for _ in range(CPU_REPEATS)) / len(calls), False)
    torch.cuda.synchronize(device)
    one_pass = _events(lambda: _run(calls, 1), device)
    rounds = max(1, min(GRAPH_CALLS // len(calls), math.ceil(GRAPH_SECONDS / max(one_pass, 1e-6))))
    graph = _record(calls, rounds, device)
    work = (lambda: _run(calls, rounds)) if graph is None else graph.replay
    work()
    seconds = statistics.median(_events(work, device) for _ in range(repeats))
    return Timing(seconds / (rounds * len(calls)), graph is not None)


def free_memory(device: torch.device) -> None:
    """Give the memory of what is no longer referred to back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run(calls: Sequence[Call], rounds: int) -> None:
    for _ in range(rounds):
        for call in calls:
            call()


def _clock(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    _run(calls, 1)
    return time.perf_counter() - start


def _events(work: Callable[[], object], device: torch.device) -> float:
    """Seconds between two events around `work`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def _record(calls: Sequence[Call], rounds: int, device: torch.device) -> torch.cuda.CUDAGraph | None:
    """None if something in the calls cannot be recorded, such as a copy from the host."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _run(calls, rounds)
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return graph
