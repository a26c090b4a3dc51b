"""What scheduling costs: `schedule()` + `update()` with many running requests, in plain Python without a model.

    python -m raytroupe.deploy.bench.scheduler

Every step is planned, answered with made-up tokens and taken in, as the engine loop does; the two calls are timed
together, the making of the answer is not. Two loads: *decode*, in which all requests run from the first to the last
measured step, and *turnover*, in which they have mixed lengths and each that ends is replaced by a new one, whose
prompt is then computed in chunks beside the others' single tokens.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from ...cluster.request import EngineRequest, SamplingParams
from ...cluster.scheduler import Scheduler
from ...cluster.scheduler_config import SchedulerConfig
from ...cluster.step import StepPlan, StepResult
from .mixed_requests import mixed_requests
from .options import JsonFile
from .report import Column, Report, percentile, publish, run_as_program

BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
VOCAB_SIZE = 32_000
LIMIT_MS = 0.5
"""The project's aim for the median of a step."""

COLUMNS = [
    Column("load", "load"),
    Column("running", "running", ".0f"),
    Column("steps", "steps", "d"),
    Column("median_ms", "median ms", ".3f"),
    Column("p99_ms", "p99 ms", ".3f"),
    Column("of_limit", f"median / {LIMIT_MS} ms", ".2f"),
]


def main(
    running: Annotated[int, typer.Option(help="Requests that run at once.")] = 256,
    steps: Annotated[int, typer.Option(max=MAX_MODEL_LEN - 512, help="Measured steps of each load.")] = 2000,
    json_file: JsonFile = None,
) -> None:
    """Measure schedule() + update()."""
    rows = [measure("decode", decode_only(running), running, steps)]
    rows.append(measure("turnover", turnover(), running, steps))
    settings = {"running": running, "block_size": BLOCK_SIZE}
    publish(Report("scheduler", settings, COLUMNS, rows), json_file)


def decode_only(running: int) -> Iterator[EngineRequest]:
    """Requests that outlast the measurement."""
    for index, source in enumerate(mixed_requests(running, VOCAB_SIZE)):
        yield request(index, source.prompt, MAX_MODEL_LEN)


def turnover() -> Iterator[EngineRequest]:
    """Requests of mixed lengths without end."""
    sources = itertools.chain.from_iterable(mixed_requests(64, VOCAB_SIZE, seed=seed) for seed in itertools.count())
    for index, source in enumerate(sources):
        yield request(index, source.prompt, source.output_len)


def request(index: int, prompt: list[int], output_len: int) -> EngineRequest:
    """A request that generates exactly `output_len` tokens."""
    return EngineRequest(request_id=str(index), prompt=prompt, sampling=SamplingParams(max_tokens=output_len))


def measure(load: str, requests: Iterator[EngineRequest], running: int, steps: int) -> dict[str, object]:
    """Run `load` until all slots are taken, then time `steps` steps; a row of the table."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=1 + running * MAX_MODEL_LEN // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=running,
            max_num_batched_tokens=2048,
        )
    )
    rng = random.Random(1)
    seconds: list[float] = []
    counts: list[int] = []
    while len(seconds) < steps:
        while scheduler.num_running + scheduler.num_waiting < running:
            scheduler.add(next(requests))
        start = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        assert plan is not None, "running requests must always have something to compute"
        answer = made_up_answer(plan, rng)
        answered = time.perf_counter()
        scheduler.update(answer)
        end = time.perf_counter()
        if counts or scheduler.num_waiting == 0:
            seconds.append(planned - start + end - answered)
            counts.append(scheduler.num_running)
    median = statistics.median(seconds)
    return {
        "load": load,
        "running": statistics.mean(counts),
        "steps": steps,
        "median_ms": median * 1e3,
        "p99_ms": percentile(seconds, 0.99) * 1e3,
        "of_limit": median * 1e3 / LIMIT_MS,
    }


def made_up_answer(plan: StepPlan, rng: random.Random) -> StepResult:
    """What the shards would report: a random token for every row that samples."""
    tokens = [rng.randrange(VOCAB_SIZE) for sampled in plan.samples if sampled]
    return StepResult(plan.step, tokens, None, model_seconds=0.0, total_seconds=0.0)


if __name__ == "__main__":
    run_as_program(main)
