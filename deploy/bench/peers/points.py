"""What every peer's script measures, and how it reports it.

The scripts of this folder run under the interpreter of the peer's own virtual environment, where Troupe is not
installed: this module needs the standard library only, and they import it by its bare name.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from typing import NamedTuple

STARTED = time.perf_counter()
"""When the script began, before it imports the peer's library."""

CONCURRENCY = (1, 8, 32)
PROMPT_LEN = 128
OUTPUT_LEN = 64
MAX_NUM_SEQS = 64
MAX_BATCHED_TOKENS = 2048
LOWEST_TOKEN, HIGHEST_TOKEN = 10, 30_000
"""Prompts are random tokens in this range: above where special tokens stand, below the end of the vocabulary."""


class Point(NamedTuple):
    """One measured load: `concurrency` requests at once, all of the same lengths in tokens."""

    concurrency: int
    prompt_len: int
    output_len: int


class Arguments(NamedTuple):
    """What a script is told on its command line."""

    model: str
    points: list[Point]
    threads: int
    vocab_size: int
    fields: dict[str, str]
    """Options of one peer only, as NAME=VALUE."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of any point."""
        return max(point.prompt_len + point.output_len for point in self.points)

    @property
    def most(self) -> int:
        """Requests of the widest point."""
        return max(point.concurrency for point in self.points)


def parse_arguments(description: str | None) -> Arguments:
    """Read the command line: MODEL --concurrency 1,8,32 --prompt 128 --output 64 --threads N."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="folder or file that the peer loads")
    parser.add_argument("--concurrency", default=",".join(map(str, CONCURRENCY)), help="requests at once")
    parser.add_argument("--prompt", type=int, default=PROMPT_LEN, help="prompt tokens of every request")
    parser.add_argument("--output", type=int, default=OUTPUT_LEN, help="generated tokens of every request")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocab-size", type=int, default=HIGHEST_TOKEN, help="prompt tokens are below this")
    parser.add_argument("--field", action="append", default=[], metavar="NAME=VALUE", help="option of one peer only")
    given = parser.parse_args()
    points = [Point(int(count), given.prompt, given.output) for count in given.concurrency.split(",")]
    fields = dict(field.split("=", 1) for field in given.field)
    return Arguments(given.model, points, given.threads, given.vocab_size, fields)


def prompts(count: int, length: int, vocab_size: int = HIGHEST_TOKEN) -> list[list[int]]:
    """`count` prompts of `length` random tokens, other ones at every call."""
    return [[random.randrange(LOWEST_TOKEN, vocab_size) for _ in range(length)] for _ in range(count)]


def batches(count: int, size: int) -> Iterator[range]:
    """0 … count − 1 in groups of at most `size`."""
    for first in range(0, count, size):
        yield range(first, min(count, first + size))


def figures(point: Point, total_s: float, prefill_s: float) -> dict[str, float]:
    """The three speeds of a point, in tokens/s; `prefill_s` is the time of the same load with one output token."""
    return {
        "prefill_tok_s": point.concurrency * point.prompt_len / prefill_s,
        "decode_tok_s": point.concurrency * (point.output_len - 1) / (total_s - prefill_s),
        "total_tok_s": point.concurrency * point.output_len / total_s,
    }


class Reporter:
    """Prints one JSON line per point; made when the model is ready."""

    def __init__(self, peer: str, model: str, precision: str) -> None:
        self._head = {"peer": peer, "model": model, "precision": precision}
        self._load_s = time.perf_counter() - STARTED

    def report(self, point: Point, total_s: float, prefill_s: float) -> None:
        """One point's figures, with the seconds that the peer took to be ready."""
        line = {
            **self._head,
            "concurrency": point.concurrency,
            "prompt_len": point.prompt_len,
            "output_len": point.output_len,
            **{name: round(value, 1) for name, value in figures(point, total_s, prefill_s).items()},
            "load_s": round(self._load_s, 1),
        }
        print(json.dumps(line), flush=True)
