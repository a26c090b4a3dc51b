"""The search for a kernel's fastest configuration, within a given time."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from triton.runtime.errors import OutOfResources

from ....cluster.errors import ConfigError
from .timing import free_memory

Config = TypeVar("Config")
NEVER = float("inf")
"""Seconds of what does not fit on the device."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What came out for one kernel and shape."""

    kernel: str
    entry: dict[str, Any]
    """Of `tuning.json`."""
    rows: list[dict[str, Any]]
    """Of the table."""


Task = Callable[[torch.device, float], Tuned]
"""Takes the device and when to stop, in `time.monotonic` seconds."""


def run_all(tasks: list[Task], device: torch.device, deadline: float) -> Iterator[Tuned]:
    """Each task with an even share of the time that is left."""
    for index, task in enumerate(tasks):
        now = time.monotonic()
        yield task(device, now + max(0.0, deadline - now) / (len(tasks) - index))
        free_memory(device)


def fastest(candidates: Iterable[Config], measure: Callable[[Config], float], deadline: float) -> Config:
    """The candidate with the least `measure` (seconds) of those that were tried before the deadline: one at least.

    Raises:
        ConfigError: none fits on the device.
    """
    best, least = None, NEVER
    for candidate in candidates:
        if best is not None and time.monotonic() > deadline:
            break
        seconds = or_never(functools.partial(measure, candidate))
        if seconds < least:
            best, least = candidate, seconds
    if best is None:
        raise ConfigError("no configuration fits on this GPU; add a smaller one to the kernel's candidates")
    return best


def or_never(measure: Callable[[], float]) -> float:
    """Seconds; NEVER where the kernel needs more shared memory than there is."""
    try:
        return measure()
    except OutOfResources:
        return NEVER


def entry_of(exact: dict[str, str | int], shape: dict[str, int], config: Any) -> dict[str, Any]:
    """An entry of `tuning.json` that was measured; `config` is a dataclass."""
    return {"for": exact, "shape": shape, "config": dataclasses.asdict(config), "source": "measured"}


def describe(config: Any) -> str:
    """A configuration on one line: '64 × 128, split 4, 4 warps, …'; without the 128 where that is not chosen."""
    values = dataclasses.asdict(config)
    tile = " × ".join(str(values.pop(size)) for size in ("block_n", "block_k") if size in values)
    return ", ".join([tile, *(f"{name} {value}" for name, value in values.items() if name != "max_rows")])
