"""From the start of the `troupe serve` process to the first streamed token, and what the time is spent on.

    python -m raytroupe.deploy.bench.startup

The server is started anew for every repeat. A line of the table is an event: what the server printed, `/health`
answering 200, or the first token of a streamed chat, which is asked for as soon as the server is healthy. The table
shows the run whose total is the median.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated

import httpx
import typer

from ...cluster.errors import EngineError
from .options import JsonFile
from .report import Column, Report, publish, run_as_program
from .serve_process import ServeProcess

COLUMNS = [
    Column("event", "event"),
    Column("at", "at s", ".2f"),
    Column("took", "took s", ".2f"),
    Column("share", "share", ".1%"),
]
LONGEST_EVENT = 80


def main(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Arguments of troupe serve, after `--`; none: the embedded models.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Starts.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Measure the time from process start to first token."""
    runs = sorted((start_once(arguments or []) for _ in range(repeats)), key=lambda events: events[-1][0])
    median = runs[(repeats - 1) // 2]
    total = median[-1][0]
    rows = []
    before = 0.0
    for at, event in median:
        rows.append({"event": event[:LONGEST_EVENT], "at": at, "took": at - before, "share": (at - before) / total})
        before = at
    totals = [events[-1][0] for events in runs]
    settings = {"arguments": " ".join(arguments or []), "repeats": repeats}
    publish(
        Report("startup", settings, COLUMNS, rows, {"totals": totals, "median_of_totals": statistics.median(totals)}),
        json_file,
    )


def start_once(arguments: list[str]) -> list[tuple[float, str]]:
    """Start a server, stream one token from it and stop it; (seconds since the start, event), in order."""
    with ServeProcess(*arguments) as server:
        healthy = server.healthy_after
        first = first_token(server)
        printed = [(at, line.strip()) for at, line in server.lines if line.strip() and at < first]
    return sorted([*printed, (healthy, "/health answers 200"), (first, "first token of a streamed chat")])


def first_token(server: ServeProcess) -> float:
    """Seconds from the start of the server's process to the first content of a streamed chat."""
    body = {
        "model": server.model_names()[0],
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "stream": True,
        "temperature": 0,
        "max_tokens": 8,
    }
    with httpx.stream("POST", f"{server.address}/v1/chat/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return time.perf_counter() - server.started
    raise EngineError("the stream ended without a token")


if __name__ == "__main__":
    run_as_program(main)
