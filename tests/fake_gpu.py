"""What a GPU's memory and torch's allocator would say, without a GPU."""

from __future__ import annotations

from raytroupe.actors.device_memory import GpuReading

GiB = 2**30


class FakeGpu:
    """A GPU and torch's allocator as arithmetic; its `Gauge` too."""

    def __init__(self, *, libraries: int, tensors: int, cached: int) -> None:
        self.libraries, self.tensors, self.cached = libraries, tensors, cached
        self._peak = 0
        self._notice_peak()

    def take(self, tensors: int, *, libraries: int = 0) -> None:
        from_cache = min(tensors, self.cached)
        self.cached -= from_cache
        self.tensors += tensors
        self.libraries += libraries
        self._notice_peak()

    def drop(self, tensors: int) -> None:
        self.tensors -= tensors
        self.cached += tensors

    def release(self) -> None:
        self.cached = 0
        self._peak = self.tensors

    def read(self) -> GpuReading:
        reserved = self.tensors + self.cached
        return GpuReading(80 * GiB, 80 * GiB - self.libraries - reserved, reserved, self._peak)

    def _notice_peak(self) -> None:
        self._peak = max(self._peak, self.tensors + self.cached)
