"""What a part of the GPU commands is, and what it is given: a device, a limit of time and a place for its rows.

Every part runs in a process of its own (`run_parts.py`), because a broken CUDA context cannot be repaired: a part that
hangs, faults or runs out of memory loses what it has not yet reported, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch

DEVICE = "device"
"""Key of the row that names the device; it stands in the table's title."""
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Row(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of the table."""

    what: str
    key: str = ""
    """Under this name later parts find `value`; empty: they do not need it."""
    value: float | None = None
    """In `unit`, without a prefix."""
    unit: str = ""
    """Such as B/s, FLOP/s, tok/s, s; empty for a share."""
    text: str = ""
    """What the table says instead of the value."""
    against: str = ""
    """What `ratio` compares with, in words."""
    ratio: float | None = None
    target: float | None = None
    """What `ratio` should reach, or stay under if `at_most`."""
    at_most: bool = False
    error: str = ""
    """Why there is no value, or what was found to be wrong."""

    @property
    def measured(self) -> str:
        """The value as people write it."""
        if self.error:
            return "error"
        if self.text or self.value is None:
            return self.text
        return with_unit(self.value, self.unit)

    @property
    def meets_target(self) -> bool | None:
        """None where there is nothing to compare."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


class Order(msgspec.Struct, kw_only=True):
    """What the process of a part is told."""

    part: str
    function: str
    """`module:function` of what measures; it is called with a `PartContext`."""
    rows: str
    """File that rows are appended to, one JSON object per line."""
    known: dict[str, float]
    """Values that earlier parts have measured, by `Row.key`."""
    tiny: bool
    seconds: float
    """After so many the process is ended."""
    began: float
    """time.time() when the whole command began."""


@dataclasses.dataclass
class PartContext:
    """What a part works with."""

    order: Order
    device: torch.device
    folder: Path
    """Empty, and removed when the part has ended."""
    report: Callable[[Row], None]
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def tiny(self) -> bool:
        """Whether sizes are such that any machine takes them, for a test of the command itself."""
        return self.order.tiny

    @property
    def seconds_left(self) -> float:
        """Until this part is ended."""
        return self.order.seconds - (time.monotonic() - self.started)

    def known(self, key: str) -> float | None:
        """A value of an earlier part; None if that was not run or failed."""
        return self.order.known.get(key)

    def say(self, text: str) -> None:
        """A line of progress, with the seconds since the command began."""
        print(f"[{time.time() - self.order.began:6.1f} s] {self.order.part}: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Reports what goes wrong inside as a row, and lets the part go on."""
        self.say(what)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.report(Row(what=what, error=explain(error)))


def explain(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def with_unit(value: float, unit: str) -> str:
    """`3.01 TB/s`, `12,345 tok/s`, `1.7 ms`; a share without a unit as a percentage."""
    if not unit:
        return f"{value:.1%}"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
    if unit == "tok/s":
        return f"{value:,.0f} tok/s" if value >= 100 else f"{value:.1f} tok/s"
    scale, prefix = next(((scale, prefix) for scale, prefix in PREFIXES if value >= scale), (1.0, ""))
    return f"{value / scale:.3g} {prefix}{unit}" if value < 1e15 else f"{value:.3g} {unit}"
