"""Recorded loads: arrival times and lengths from a file in Mooncake's or in BurstGPT's format.

Mooncake (arXiv:2407.00079, github.com/kvcache-ai/Mooncake): JSON lines with `timestamp` in ms, `input_length`,
`output_length` and `hash_ids`, one id per block of 512 prompt tokens. Two prompts whose first k ids are equal have
their first k blocks in common.

BurstGPT (arXiv:2401.17644, github.com/HPMLL/BurstGPT): CSV with the columns `Timestamp` in s, `Request tokens` and
`Response tokens`, among others. Rows without response tokens are failed requests; they are left out.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from ...cluster.errors import ConfigError

FORMATS = ("mooncake", "burstgpt")
MOONCAKE_BLOCK = 512


class TraceEntry(msgspec.Struct, frozen=True):
    """One recorded request."""

    arrival: float
    """Seconds after the first one."""
    prompt_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()
    """What each block of the prompt is; empty where the trace does not tell."""


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()


def read_trace(path: Path, form: str = "auto", limit: int | None = None) -> list[TraceEntry]:
    """The first `limit` requests of a trace, by arrival.

    Args:
        form: `mooncake`, `burstgpt`, or `auto`: JSON lines are Mooncake's, anything else is BurstGPT's.

    Raises:
        ConfigError: no such file, no usable requests, or a line that cannot be read; names the line.
    """
    if form not in ("auto", *FORMATS):
        raise ConfigError(f"--trace-format {form}: choose auto, {' or '.join(FORMATS)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            beginning = file.read(1)
            file.seek(0)
            if form == "auto":
                form = "mooncake" if beginning == "{" else "burstgpt"
            reader = _read_mooncake(path, file) if form == "mooncake" else _read_burstgpt(path, file)
            # A trace is in the order of its arrivals, so its beginning is enough; sorting mends small disorder.
            entries = list(itertools.islice(reader, limit))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path}: {getattr(error, 'strerror', None) or error}") from None
    if not entries:
        raise ConfigError(f"--trace {path}: no requests with prompt and output tokens in it")
    entries.sort(key=lambda entry: entry.arrival)
    first = entries[0].arrival
    return [msgspec.structs.replace(entry, arrival=entry.arrival - first) for entry in entries]


def _read_mooncake(path: Path, lines: Iterable[str]) -> Iterator[TraceEntry]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            read = msgspec.json.decode(line, type=_MooncakeLine)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}:{number}: not a line of a Mooncake trace: {error}") from None
        if read.input_length > 0 and read.output_length > 0:
            yield TraceEntry(read.timestamp / 1e3, read.input_length, read.output_length, read.hash_ids)


def _read_burstgpt(path: Path, lines: Iterable[str]) -> Iterator[TraceEntry]:
    reader = csv.DictReader(lines)
    wanted = ("Timestamp", "Request tokens", "Response tokens")
    missing = [name for name in wanted if name not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"{path}: not a BurstGPT trace: no column {missing[0]!r}; needed are {', '.join(wanted)}")
    for row in reader:
        try:
            arrival, prompt_len, output_len = (float(row[name]) for name in wanted)
            if not math.isfinite(arrival + prompt_len + output_len):
                raise ValueError
        except (TypeError, ValueError):
            values = ", ".join(repr(row[name]) for name in wanted)
            raise ConfigError(f"{path}:{reader.line_num}: not a time and two counts: {values}") from None
        if prompt_len > 0 and output_len > 0:
            yield TraceEntry(arrival, int(prompt_len), int(output_len))


def scale_trace(entries: list[TraceEntry], time_scale: float = 1.0, length_scale: float = 1.0) -> list[TraceEntry]:
    """A trace with all times multiplied by `time_scale` (0.5: twice as fast) and all lengths by `length_scale`."""
    return [
        TraceEntry(
            entry.arrival * time_scale,
            max(1, round(entry.prompt_len * length_scale)),
            max(1, round(entry.output_len * length_scale)),
            entry.hash_ids,
        )
        for entry in entries
    ]
