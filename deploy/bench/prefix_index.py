"""What the ingress's index of prefixes costs: memory, a look-up, an event, and the longest pause.

    python -m raytroupe.deploy.bench.prefix_index

The index is filled with chains of blocks: every replica has its own ones, and one in eight chains is shared by several.
A look-up is timed for prompts that are drawn anew every time, so that their blocks are not in the processor's caches:
half of a prompt is known and the rest is not, as in a conversation that goes on, or all of it is known.
Events come as a busy replica sends them: a few blocks stored and as many evicted in one report.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Annotated, TypeVar

import numpy as np
import typer
from numpy.typing import NDArray

from ...router.prefix_index import PrefixIndex
from .options import JsonFile
from .report import Column, Report, percentile, publish, run_as_program

T = TypeVar("T")

CHAIN = 512
"""Blocks of a chain: the longest prompt that is looked up."""
PROMPTS = (32, 128, 512)
"""Blocks."""
SHARED = 8
"""One in so many chains is held by several replicas."""
EVENTS = 8
"""Blocks stored, and evicted, by one report."""
SNAPSHOT = 2048
"""Blocks that are taken in at once (`router/report_receiver.py`)."""
LIMIT_US = 200.0
"""The project's aim for the 99th percentile of a whole decision."""
LIMIT_BYTES = 100.0
"""The project's aim for a block."""

COLUMNS = [
    Column("what", "what"),
    Column("median", "median µs", ".1f"),
    Column("p99", "p99 µs", ".1f"),
    Column("worst", "worst µs", ".0f"),
    Column("per_block", "µs per block", ".3f"),
    Column("of_limit", f"p99 / {LIMIT_US:.0f} µs", ".2f"),
]


def main(
    blocks: Annotated[int, typer.Option(min=10_000, help="Blocks in the index.")] = 1_000_000,
    replicas: Annotated[int, typer.Option(min=2, help="Replicas that hold them.")] = 64,
    repeats: Annotated[int, typer.Option(min=100, help="Times that each operation is timed.")] = 2000,
    json_file: JsonFile = None,
) -> None:
    """Measure the index of prefixes."""
    index = PrefixIndex(blocks)
    chains = fill(index, blocks, replicas)
    bytes_per_block = index.memory_bytes() / index.num_blocks
    rng = random.Random(2)
    rows = []
    for length in PROMPTS:
        rows.append(look_up(index, chains, f"look up {length} blocks, half known", length, length // 2, repeats, rng))
        rows.append(look_up(index, chains, f"look up {length} blocks, all known", length, length, repeats, rng))
    rows.append(take_events(index, chains, replicas, repeats, rng))
    rows.append(take_snapshots(index, chains, replicas, repeats // 10, rng))
    index.check_integrity()
    settings = {"blocks": index.num_blocks, "replicas": replicas, "bytes_per_block": round(bytes_per_block, 1)}
    notes = {"bytes_per_block": bytes_per_block, "of_limit": bytes_per_block / LIMIT_BYTES, "dropped": index.dropped}
    publish(Report("prefix_index", settings, COLUMNS, rows, notes), json_file)


def fill(index: PrefixIndex, blocks: int, replicas: int) -> NDArray[np.int64]:
    """Chains of made-up blocks, one a row, which are all in the index."""
    chains = np.random.default_rng(1).integers(0, 1 << 60, (blocks // CHAIN, CHAIN), np.int64)
    rng = random.Random(1)
    for number, chain in enumerate(chains):
        if number % SHARED:
            index.stored(f"replica-{number % replicas}", chain)
        else:
            for replica in rng.sample(range(replicas), rng.randint(2, replicas)):
                index.stored(f"replica-{replica}", chain[: rng.randrange(1, CHAIN)])
            index.stored(f"replica-{number % replicas}", chain)
    return chains


def look_up(
    index: PrefixIndex,
    chains: NDArray[np.int64],
    what: str,
    length: int,
    known: int,
    repeats: int,
    rng: random.Random,
) -> dict[str, object]:
    """Prompts of `length` blocks of which the first `known` are in the index; a row of the table."""

    def prompt() -> list[int]:
        chain: list[int] = chains[rng.randrange(len(chains))][:known].tolist()
        return chain + [rng.getrandbits(60) for _ in range(length - known)]

    return row(what, length, time_each(prompt, index.overlaps, repeats))


def take_events(
    index: PrefixIndex, chains: NDArray[np.int64], replicas: int, repeats: int, rng: random.Random
) -> dict[str, object]:
    """Reports with a few blocks each, one report evicting what the one before it has stored; a row of the table."""

    def report() -> tuple[str, list[int], list[int]]:
        number = rng.randrange(len(chains))
        evicted = chains[number][-EVENTS:].tolist()
        chains[number][-EVENTS:] = stored = [rng.getrandbits(60) for _ in range(EVENTS)]
        return f"replica-{number % replicas}", stored, evicted

    def take(report: tuple[str, list[int], list[int]]) -> None:
        replica, stored, evicted = report
        index.evicted(replica, evicted)
        index.stored(replica, stored)

    what = f"a report: {EVENTS} stored, {EVENTS} evicted"
    return row(what, 2 * EVENTS, time_each(report, take, repeats))


def take_snapshots(
    index: PrefixIndex, chains: NDArray[np.int64], replicas: int, repeats: int, rng: random.Random
) -> dict[str, object]:
    """The first parts of snapshots, of which each makes a replica's other blocks void; a row of the table."""

    def snapshot() -> tuple[str, NDArray[np.int64]]:
        rows = rng.sample(range(len(chains)), SNAPSHOT // CHAIN)
        return f"replica-{rng.randrange(replicas)}", chains[rows].reshape(-1)

    seconds = time_each(snapshot, lambda part: index.snapshot(*part), repeats)
    return row(f"a part of a snapshot: {SNAPSHOT} blocks", SNAPSHOT, seconds)


def time_each(make: Callable[[], T], use: Callable[[T], object], repeats: int) -> list[float]:
    """Seconds that `use` takes of each of `repeats` made things."""
    seconds = []
    for _ in range(repeats):
        thing = make()
        start = time.perf_counter()
        use(thing)
        seconds.append(time.perf_counter() - start)
    return seconds


def row(what: str, blocks: int, seconds: list[float]) -> dict[str, object]:
    """A row of the table."""
    p99 = percentile(seconds, 0.99) * 1e6
    median = statistics.median(seconds) * 1e6
    return {
        "what": what,
        "median": median,
        "p99": p99,
        "worst": max(seconds) * 1e6,
        "per_block": median / blocks,
        "of_limit": p99 / LIMIT_US,
    }


if __name__ == "__main__":
    run_as_program(main)
