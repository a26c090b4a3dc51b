"""Continuous batching seen by a client: many requests at once against the same requests one at a time, over HTTP.

    python -m raytroupe.deploy.make_bench_model bench-models/llama-254m
    python -m raytroupe.deploy.bench.over_http bench-models/llama-254m

Requests have mixed lengths (`mixed_requests.py`) and end only at their length. Every run has fresh prompt tokens, so
that nothing comes from the prefix cache. The server computes in bfloat16 unless told otherwise. Runs of both kinds
alternate; the table has the medians.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from ...cluster.errors import EngineError
from .mixed_requests import BenchRequest, mixed_requests, wanted_tokens
from .report import Column, Report, measure_in_turn, publish, run_as_program
from .serve_process import ServeProcess

COLUMNS = [
    Column("clients", "requests"),
    Column("seconds", "seconds", ".2f"),
    Column("tokens_per_second", "output tokens/s", ".1f"),
    Column("ratio", "× one at a time", ".2f"),
]


def main(
    model: Annotated[str, typer.Argument(help="Folder of the model.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of troupe serve, after `--`.")] = None,
    requests: Annotated[int, typer.Option(help="Requests in one run.")] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of either kind.")] = 3,
    vocab_size: Annotated[int, typer.Option(help="Prompt tokens are below this.")] = 32_000,
    stream: Annotated[bool, typer.Option(help="Read the answers as server-sent events.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Measure requests at once against one at a time."""
    variants = iter(range(10**9))

    def workload() -> list[BenchRequest]:
        return mixed_requests(requests, vocab_size, variant=next(variants))

    flags = ["--dtype", "bfloat16", *(arguments or [])]  # the last of two equal flags counts
    with ServeProcess(model, *flags) as server:
        client = CompletionClient(server.address, server.model_names()[0], stream)
        asyncio.run(client.at_once(mixed_requests(4, vocab_size, output_len=(4, 4), seed=1)))
        seconds = measure_in_turn(
            {
                "one at a time": lambda: asyncio.run(client.one_at_a_time(workload())),
                "at once": lambda: asyncio.run(client.at_once(workload())),
            },
            repeats,
        )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = wanted_tokens(workload())
    rows = [
        {
            "clients": f"{requests} {name}",
            "seconds": median,
            "tokens_per_second": tokens / median,
            "ratio": medians["one at a time"] / median,
        }
        for name, median in medians.items()
    ]
    settings = {
        "model": Path(model).name,
        "requests": requests,
        "stream": stream,
        "repeats": repeats,
        "flags": " ".join(flags),
    }
    publish(Report("over_http", settings, COLUMNS, rows, {"seconds": seconds, "output_tokens": tokens}), output)


class CompletionClient:
    """Sends benchmark requests to `/v1/completions` and checks that each got all its tokens."""

    def __init__(self, address: str, model: str, stream: bool) -> None:
        self._url = f"{address}/v1/completions"
        self._model = model
        self._stream = stream

    async def at_once(self, requests: list[BenchRequest]) -> float:
        """Seconds until the last of `requests`, all sent at the same time, is answered."""
        async with self._client() as client:
            start = time.perf_counter()
            await asyncio.gather(*(self._complete(client, request) for request in requests))
            return time.perf_counter() - start

    async def one_at_a_time(self, requests: list[BenchRequest]) -> float:
        """Seconds until the last of `requests` is answered, each sent when the one before it is answered."""
        async with self._client() as client:
            start = time.perf_counter()
            for request in requests:
                await self._complete(client, request)
            return time.perf_counter() - start

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))

    async def _complete(self, client: httpx.AsyncClient, request: BenchRequest) -> None:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.output_len,
            "temperature": 0,
            "ignore_eos": True,
        }
        if self._stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        usage: dict[str, Any] = {}
        async with client.stream("POST", self._url, json=body) as answer:
            if answer.status_code != 200:
                raise EngineError(f"{answer.status_code} from {self._url}: {(await answer.aread()).decode()}")
            if self._stream:
                async for event in answer.aiter_lines():
                    if event.startswith("data: {"):
                        usage = json.loads(event.removeprefix("data: ")).get("usage") or usage
            else:
                usage = json.loads(await answer.aread())["usage"]
        if usage.get("completion_tokens") != request.output_len:
            raise EngineError(f"asked for {request.output_len} tokens and got {usage}; the times would not compare")


if __name__ == "__main__":
    run_as_program(main)
