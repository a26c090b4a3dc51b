"""Continuous batching seen by a client: requests at once over HTTP, against one at a time and against the engine alone.

    python -m raytroupe.deploy.make_bench_model bench-models/llama-254m
    python -m raytroupe.deploy.bench.over_http bench-models/llama-254m

`troupe serve` is started with one replica; the same requests go to it over HTTP and, in this process, to an engine of
the same configuration while the server has nothing to do. Requests have mixed lengths (`mixed_requests.py`) and end
only at their length. Every run has fresh prompt tokens, so that nothing comes from the prefix cache. The sides take
turns; the table has the medians.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from ...actors.local_engine import LocalEngine
from ...cluster.errors import EngineError
from .client import BenchClient, Outcome, ServerOptions, parse_url
from .command import parse_fields
from .engine_points import run_engine
from .load import closed_loop
from .mixed_requests import BenchRequest, mixed_requests, wanted_tokens
from .options import DTYPE, VOCAB_SIZE, JsonFile, ModelFolder, Repeats, Requests
from .report import Column, Report, measure_in_turn, publish, run_as_program
from .serve_process import ServeProcess
from .summary import summarise
from .workload import Request

COLUMNS = [
    Column("side", "requests"),
    Column("seconds", "seconds", ".2f"),
    Column("tokens_per_second", "output tok/s", ".1f"),
    Column("of_engine", "of the engine's speed", ".1%"),
    Column("ratio", "× one at a time", ".2f"),
]
KV_CACHE_MEMORY = "1GiB"
"""Of each side, as neither may take all that is left."""
ONE_AT_A_TIME, AT_ONCE, IN_PROCESS = "one at a time over HTTP", "at once over HTTP", "at once in process"


def main(
    model: ModelFolder,
    requests: Requests = 32,
    repeats: Repeats = 3,
    vocab_size: Annotated[int, typer.Option(help="Prompt tokens are below this.")] = VOCAB_SIZE,
    field: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Field of the model's configuration, on both sides.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure requests at once over HTTP."""
    fields: dict[str, Any] = {"dtype": DTYPE, "kv_cache_memory": KV_CACHE_MEMORY, **parse_fields(field or [])}
    flags = [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", value)]
    variants = itertools.count()

    def workload() -> list[BenchRequest]:
        return mixed_requests(requests, vocab_size, variant=next(variants))

    with ServeProcess(str(model), *flags) as server, LocalEngine(model, **fields) as engine:
        options = ServerOptions(url=parse_url(server.address), model=server.model_names()[0])
        warm_up = mixed_requests(4, vocab_size, output_len=(4, 4), seed=1)
        run_over_http(options, warm_up, len(warm_up))
        run_engine(engine, warm_up)
        seconds = measure_in_turn(
            {
                ONE_AT_A_TIME: lambda: run_over_http(options, workload(), 1),
                AT_ONCE: lambda: run_over_http(options, workload(), requests),
                IN_PROCESS: lambda: run_engine(engine, workload()),
            },
            repeats,
        )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = wanted_tokens(workload())
    rows: list[dict[str, Any]] = [
        {
            "side": f"{requests} {name}",
            "seconds": median,
            "tokens_per_second": tokens / median,
            "of_engine": medians[IN_PROCESS] / median,
            "ratio": medians[ONE_AT_A_TIME] / median,
        }
        for name, median in medians.items()
    ]
    settings = {"model": Path(model).name, "requests": requests, "repeats": repeats, **fields}
    publish(Report("over_http", settings, COLUMNS, rows, {"seconds": seconds, "output_tokens": tokens}), json_file)


def run_over_http(options: ServerOptions, workload: list[BenchRequest], clients: int) -> float:
    """Seconds until the last of `workload` is answered by a server that so many clients ask.

    Raises:
        EngineError: a request failed or got other than its number of tokens; the times would not compare.
    """
    outcomes: list[Outcome] = []

    async def run() -> None:
        client = BenchClient(options)
        requests = (Request(source.prompt, len(source.prompt), source.output_len) for source in workload)
        try:
            await closed_loop(client, requests, clients, outcomes)
        finally:
            client.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    for outcome in outcomes:
        if outcome.error is not None:
            raise EngineError(f"a request failed: {outcome.error}: {outcome.detail}")
        if outcome.output_len != outcome.wanted_len:
            raise EngineError(f"asked for {outcome.wanted_len} tokens and got {outcome.output_len}")
    return summarise(outcomes).seconds


if __name__ == "__main__":
    run_as_program(main)
