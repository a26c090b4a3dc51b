"""Interactive requests next to batch work in one server: what it costs either of them.

    python -m raytroupe.deploy.bench.routing.classes --json figures.json
    python -m raytroupe.deploy.bench.routing.classes --rate 4 --repeats 3

One replica gets, in turn, interactive requests alone (an open loop of Poisson arrivals), batch requests alone (a closed
loop with more clients than the replica has places), and both. The class is in the header `x-latency-class`. The rate of
the interactive requests is a share of what the replica can answer of their kind, which a short closed loop finds out,
unless `--rate` gives it. Prompts are new in every phase; lengths and arrivals repeat.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop
from rich.console import Console

from ....cluster.errors import EngineError
from ....cluster.latency_class import BATCH, DEFAULT_TARGETS, INTERACTIVE
from ....cluster.model_spec import load_spec
from ...model_folder import find_model_folder
from ..client import BenchClient, Outcome, ServerOptions, parse_url
from ..command import EXIT_INTERRUPTED
from ..lengths import Lengths, parse_lengths
from ..load import closed_loop, open_loop
from ..options import JsonFile, Repeats
from ..prompts import TokenPrompts
from ..report import Column, Report, describe, run_as_program
from ..serve_process import ServeProcess
from ..workload import Request, poisson_arrivals, synthetic
from .class_figures import ALONE, BATCH_ALONE, PHASES, PhaseRun, phase_rows, verdict_lines
from .every_token import EVERY_TOKEN

CLASS_HEADER = "x-latency-class"
PAUSE_SECONDS = 1.0
"""Between phases, for the replica to give up what the last one has left."""
COLUMNS = [
    Column("phase", "phase"),
    Column("requests", "req", "d"),
    Column("rejected", "rej", "d"),
    Column("errors", "err", "d"),
    Column("good", "good", ".1%"),
    Column("ttft_p50", "TTFT p50", ",.1f"),
    Column("ttft_p99", "p99", ",.1f"),
    Column("tpot_p50", "TPOT", ",.1f"),
    Column("latency_ratio", "× alone", ".2f"),
    Column("batch_requests", "batch req", "d"),
    Column("batch_rejected", "rej", "d"),
    Column("batch_errors", "err", "d"),
    Column("batch_tokens_per_second", "tok/s", ",.0f"),
    Column("batch_share", "of alone", ".1%"),
]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured, and how long."""

    model: str
    rate: float | None
    share: float
    requests: int
    longest: float
    batch_seconds: float
    ramp: float
    calibration: float
    batch_clients: int
    interactive_prompt: Lengths
    interactive_output: Lengths
    batch_prompt: Lengths
    batch_output: Lengths
    repeats: int
    seed: int


class Loads:
    """Makes the requests of both classes; those of every call have other tokens."""

    def __init__(self, settings: Settings, prompts: TokenPrompts) -> None:
        self._settings = settings
        self._prompts = prompts
        self._variants = itertools.count()

    def interactive(self, rate: float, repeat: int) -> Iterator[Request]:
        """Poisson arrivals with `rate` requests/s, without end; those of a repeat are the same in every phase."""
        return self._synthetic(self._settings.interactive_prompt, self._settings.interactive_output, rate, repeat)

    def batch(self, repeat: int) -> Iterator[Request]:
        """Without end."""
        return self._synthetic(self._settings.batch_prompt, self._settings.batch_output, math.inf, repeat)

    def _synthetic(self, prompt: Lengths, output: Lengths, rate: float, repeat: int) -> Iterator[Request]:
        seed = self._settings.seed + repeat
        arrivals = poisson_arrivals(rate, seed)
        return synthetic(self._prompts, prompt, output, arrivals, seed=seed, variant=next(self._variants))


def main(
    model: Annotated[str, typer.Option(help="Folder or name of the model.")] = "demo-large",
    rate: Annotated[float | None, typer.Option(help="Interactive requests/s. Default: found out.")] = None,
    share: Annotated[float, typer.Option(help="Of the replica's capacity that is found out.")] = 0.12,
    requests: Annotated[int, typer.Option(min=1, help="Interactive requests of a phase.")] = 320,
    longest: Annotated[float, typer.Option(help="Seconds of a phase at most; then it has fewer requests.")] = 60.0,
    batch_seconds: Annotated[float, typer.Option(help="Seconds of batch alone.")] = 20.0,
    ramp: Annotated[float, typer.Option(help="Seconds of batch that do not count, before those that do.")] = 5.0,
    batch_clients: Annotated[int, typer.Option(min=1, help="Batch requests at once.")] = 96,
    interactive_prompt: Annotated[str, typer.Option(help="Tokens, such as 64 or uniform:32:128.")] = "uniform:32:128",
    interactive_output: Annotated[str, typer.Option(help="Tokens, in the same forms.")] = "16",
    batch_prompt: Annotated[str, typer.Option(help="Tokens, in the same forms.")] = "uniform:64:320",
    batch_output: Annotated[str, typer.Option(help="Tokens, in the same forms.")] = "uniform:64:192",
    kv_cache_memory: Annotated[str, typer.Option(help="Of the replica.")] = "512MiB",
    repeats: Repeats = 2,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few seconds, to see that it runs; the figures mean nothing.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure interactive next to batch."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is ended then, too
    settings = Settings(
        model=model,
        rate=rate,
        share=share,
        requests=20 if quick else requests,
        longest=5.0 if quick else longest,
        batch_seconds=3.0 if quick else batch_seconds,
        ramp=1.0 if quick else ramp,
        calibration=2.0 if quick else 8.0,
        batch_clients=16 if quick else batch_clients,
        interactive_prompt=parse_lengths(interactive_prompt, "--interactive-prompt"),
        interactive_output=parse_lengths(interactive_output, "--interactive-output"),
        batch_prompt=parse_lengths(batch_prompt, "--batch-prompt"),
        batch_output=parse_lengths(batch_output, "--batch-output"),
        repeats=1 if quick else repeats,
        seed=seed,
    )
    console = Console()
    runs: list[PhaseRun] = []
    found: dict[str, Any] = {"kv_cache_memory": kv_cache_memory}
    failure: BaseException | None = None
    try:
        console.print(f"starting {model}", highlight=False)
        with ServeProcess(model, "--kv-cache-memory", kv_cache_memory) as server:
            measure(settings, server, runs, found, console)
    except (KeyboardInterrupt, EngineError) as error:  # what has been measured is of use all the same
        failure = error
    publish_phases(settings, runs, found, failure is not None, json_file)
    if isinstance(failure, EngineError):
        raise failure
    if failure is not None:
        raise typer.Exit(EXIT_INTERRUPTED)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    settings: Settings, server: ServeProcess, runs: list[PhaseRun], found: dict[str, Any], console: Console
) -> None:
    """Fill `runs` with whole phases, forwards and backwards in turn, and `found` with the rate.

    Raises:
        EngineError: the server answers no request.
    """
    spec = load_spec(find_model_folder(settings.model))
    loads = Loads(settings, TokenPrompts(spec.vocab_size, secrets.randbits(32)))
    plain = ServerOptions(url=parse_url(server.address), model=server.model_names()[0], fields=EVERY_TOKEN)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        capacity = runner.run(_capacity(plain, loads, settings))
        rate = settings.rate if settings.rate is not None else settings.share * capacity
        seconds = min(settings.longest, settings.requests / rate)
        found |= {"capacity": round(capacity, 2), "rate": round(rate, 2), "seconds": round(seconds, 1)}
        console.print(
            f"{capacity:.1f} interactive requests/s at most; {rate:.2f}/s for {seconds:.0f} s in a phase",
            highlight=False,
        )
        for repeat in range(settings.repeats):
            for phase in PHASES if repeat % 2 == 0 else PHASES[::-1]:
                with console.status(f"repeat {repeat + 1} of {settings.repeats}: {phase}"):
                    run = runner.run(_phase(phase, repeat, plain, loads, settings, rate, seconds))
                runs.append(run)
                time.sleep(PAUSE_SECONDS)


async def _capacity(options: ServerOptions, loads: Loads, settings: Settings) -> float:
    """Interactive requests/s that are answered if there are always some waiting, after a warm-up of the same kind."""
    client, outcomes = BenchClient(options), list[Outcome]()
    try:
        for seconds in (settings.calibration / 4, settings.calibration):
            outcomes.clear()
            requests = loads.interactive(math.inf, repeat=0)
            await closed_loop(client, requests, settings.batch_clients, outcomes, duration=seconds)
    finally:
        client.close()
    answered = [outcome for outcome in outcomes if outcome.error is None]
    if not answered:
        raise EngineError(f"the server answers no request: {outcomes[0].error}: {outcomes[0].detail}")
    return len(answered) / (max(one.finished for one in answered) - min(one.scheduled for one in answered))


async def _phase(
    phase: str, repeat: int, plain: ServerOptions, loads: Loads, settings: Settings, rate: float, seconds: float
) -> PhaseRun:
    """Put the loads of one phase on the server. Interactive requests count from the moment when batch is steady."""
    clients = {
        name: BenchClient(msgspec.structs.replace(plain, headers={CLASS_HEADER: name})) for name in (INTERACTIVE, BATCH)
    }
    interactive: list[Outcome] = []
    batch: list[Outcome] = []
    background = None
    gc.collect()
    gc.freeze()  # so that no long collection holds up the arrival of tokens
    try:
        if phase != ALONE:
            background = asyncio.create_task(
                closed_loop(clients[BATCH], loads.batch(repeat), settings.batch_clients, batch)
            )
            await asyncio.sleep(settings.ramp)
        begin = time.perf_counter()
        if phase == BATCH_ALONE:
            await asyncio.sleep(settings.batch_seconds)
        else:
            await open_loop(clients[INTERACTIVE], loads.interactive(rate, repeat), interactive, duration=seconds)
        end = time.perf_counter()
        if background is not None and background.done():
            background.result()  # the load has no end, so this is an error
    finally:
        # What is under way is given up: to wait for it would take longer than it is worth.
        if background is not None:
            background.cancel()
            await asyncio.gather(background, return_exceptions=True)
        for client in clients.values():
            client.close()
        gc.unfreeze()
    return PhaseRun(phase, begin, end, interactive, batch)


# --- reporting --------------------------------------------------------------------------------------------------------


def publish_phases(
    settings: Settings, runs: list[PhaseRun], found: dict[str, Any], early: bool, json_file: Path | None
) -> None:
    """Print the table and what became of the aims; write the same as JSON."""
    targets = DEFAULT_TARGETS[INTERACTIVE]
    limits = {"ttft": targets.ttft, "tpot": targets.tpot}
    rows = phase_rows(runs, limits)
    described = {name: getattr(value, "text", value) for name, value in msgspec.structs.asdict(settings).items()}
    described |= {**found, "good": limits}
    said = [*verdict_lines(rows), *(["ended early: the figures are of the phases until then"] if early else [])]
    report = Report("routing.classes", described, COLUMNS, rows, {"remarks": said, "ended_early": early})
    console = Console(width=max(130, Console().width))
    console.print(describe(described), highlight=False, soft_wrap=True)
    console.print(report.table("interactive next to batch (latencies in ms; batch: output tok/s)"))
    for line in said:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if json_file is not None:
        report.write(json_file)


if __name__ == "__main__":
    run_as_program(main)
