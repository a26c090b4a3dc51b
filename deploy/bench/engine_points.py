"""Speeds of the engine in process: prefill, decode and all of it, for so many equal requests at once."""

from __future__ import annotations

import time

import msgspec

from ...actors.local_engine import LocalEngine
from ...cluster.request import SamplingParams
from ...cluster.step import StepResult
from .distribution import Distribution, distribution
from .mixed_requests import BenchRequest
from .peers.points import Point, figures, prompts

WARM_UP = Point(2, 16, 2)


class StepTimes(msgspec.Struct):
    """When the tokens of equal requests came, from the number of tokens of every step.

    All requests of a point start together and run to their length, so the tokens of a step are one for each request
    that has begun and has not ended, and the rest are first tokens. That holds unless a request is preempted;
    `complete` tells.
    """

    point: Point
    start: float
    first_tokens: list[float] = []
    """Seconds from the start to each request's first token."""
    gaps: list[float] = []
    """Seconds between consecutive tokens of a request."""
    _running: dict[int, int] = {}
    """Tokens so far → requests that have so many."""
    _last: float = 0.0
    _tokens: int = 0

    def take(self, result: StepResult) -> None:
        """Note the tokens of a step that has just ended."""
        now = time.perf_counter()
        tokens = len(result.tokens)
        if not tokens:
            return
        going_on = sum(self._running.values())
        self.gaps += [now - self._last] * going_on
        begun = tokens - going_on
        self.first_tokens += [now - self.start] * begun
        self._tokens += tokens
        ahead = {count + 1: requests for count, requests in self._running.items()}
        running = {count: requests for count, requests in ahead.items() if count < self.point.output_len}
        if begun and self.point.output_len > 1:
            running[1] = begun
        self._running, self._last = running, now

    @property
    def complete(self) -> bool:
        """Whether the counting worked out: every request has begun once, and all tokens were seen."""
        point = self.point
        return len(self.first_tokens) == point.concurrency and self._tokens == point.concurrency * point.output_len


class Run(msgspec.Struct, frozen=True):
    """One measurement of one point."""

    total_s: float
    prefill_s: float
    """Of the same load with one output token."""
    ttft: Distribution | None
    itl: Distribution | None

    def speeds(self, point: Point) -> dict[str, float]:
        """Prefill, decode and total tokens/s."""
        return figures(point, self.total_s, self.prefill_s)


def run_point(engine: LocalEngine, point: Point, vocab_size: int) -> Run:
    """Measure a point once."""
    total_s, times = timed(engine, point, vocab_size)
    prefill_s, _ = timed(engine, point._replace(output_len=1), vocab_size)
    seen = times.complete
    return Run(
        total_s,
        prefill_s,
        distribution(times.first_tokens) if seen else None,
        distribution(times.gaps) if seen else None,
    )


def timed(engine: LocalEngine, point: Point, vocab_size: int) -> tuple[float, StepTimes]:
    """Seconds for `point`, all requests added at once, greedy and regardless of ends of sequence."""
    batch = prompts(point.concurrency, point.prompt_len, vocab_size)
    times = StepTimes(point, time.perf_counter())
    engine.observe = times.take
    try:
        start = times.start = time.perf_counter()
        completions = engine.generate(batch, SamplingParams(temperature=0, max_tokens=point.output_len))
        seconds = time.perf_counter() - start
    finally:
        engine.observe = None
    assert all(len(completion.tokens) == point.output_len for completion in completions), "a request stopped early"
    return seconds, times


def run_engine(engine: LocalEngine, requests: list[BenchRequest]) -> float:
    """Seconds for all requests, added at once."""
    start = time.perf_counter()
    completions = engine.generate(
        [request.prompt for request in requests],
        [SamplingParams(temperature=0, max_tokens=request.output_len) for request in requests],
    )
    seconds = time.perf_counter() - start
    lengths = [len(completion.tokens) for completion in completions]
    assert lengths == [request.output_len for request in requests], "a request stopped early"
    return seconds
