"""Where the time of a start goes: the seconds of a shard's phases, and one line about those of a whole replica."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

PROCESS = "process"
"""From asking Ray for the shards until all of them answer."""
IMPORTS = "imports"
CONNECT = "connect"
"""With the wait for the shard that comes last."""
WEIGHTS = "weights"
KERNELS = "kernels"
"""Compiling, as far as it took longer than reading the weights, and packing weights."""
PROFILE = "profile"
KV_CACHE = "KV cache"
WARM_UP = "warm-up"
"""First steps, and the capture of CUDA graphs."""
PHASES = (PROCESS, IMPORTS, CONNECT, WEIGHTS, KERNELS, PROFILE, KV_CACHE, WARM_UP)
"""In the order in which they happen."""


class StartupClock:
    """The seconds that a shard spends in each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time as one of `PHASES`, in addition to what that has already."""
        assert name in PHASES, name
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def slowest(shards: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every phase, the time of the shard that took longest.

    Connecting is the exception: the shard that is there last waits for nobody, and the others wait for what it did
    before, which is counted there.
    """
    seconds = {}
    for name in PHASES:
        taken = [shard[name] for shard in shards if name in shard]
        if taken:
            seconds[name] = min(taken) if name == CONNECT else max(taken)
    return seconds


def describe_startup(seconds: Mapping[str, float], elapsed: float) -> str:
    """One line: the phases that show in tenths of a second, and what is left of `elapsed` seconds as the rest.

    The parts add up to the sum that is said. It is more than `elapsed` where different shards were slow at different
    times.
    """
    tenths = {name: round(10 * seconds[name]) for name in PHASES if name in seconds}
    rest = max(0, round(10 * elapsed) - sum(tenths.values()))
    parts = [f"{name} {count / 10:.1f}" for name, count in [*tenths.items(), ("rest", rest)] if count]
    total = f"start-up: {(sum(tenths.values()) + rest) / 10:.1f} s"
    return f"{total} = {' + '.join(parts)}" if parts else total
