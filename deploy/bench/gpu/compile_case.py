"""What `compile_report.py` compiles: one specialisation of a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """One specialisation of a kernel."""

    kernel: Any
    label: str
    """What it is specialised for."""
    types: Mapping[str, str]
    """Of every argument that is not constant."""
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    capabilities: tuple[int, ...] = (80, 90)
    """Compute capabilities, times ten, that it is meant for."""
    hot: bool = True
    """Runs in every layer or for every token: may spill nothing."""
    unaligned: tuple[str, ...] = ("rows", "eps", "scale", "alpha")
    """Arguments that are not known to be multiples of 16 (bytes, for pointers)."""

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__
