"""`troupe bench serve`: measure an OpenAI-compatible server over HTTP, one load after the other."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import resource
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...cluster.errors import ConfigError, EngineError
from .client import BenchClient, Outcome, ServerOptions, parse_url
from .lengths import Lengths
from .load import Tick, closed_loop, open_loop
from .prompts import PromptSource, TextPrompts, TokenPrompts, text_prompts
from .server_probe import Probe, choose_model
from .summary import Summary, summarise
from .traces import TraceEntry, read_trace, scale_trace
from .workload import Prompt, Request, SharedPrefixes, poisson_arrivals, recorded, synthetic

FEWEST_REQUESTS = 16
REQUESTS_PER_CLIENT = 4
SECONDS_OF_ARRIVALS = 30.0
REQUESTS_AT_ONCE = 64
"""Of the rate `inf`, if the user gives no number."""
REFRESHES_PER_SECOND = 2
"""Of the progress bar; every one costs CPU time that the server lacks."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One measured load: `concurrency` clients, or arrivals with `rate` requests/s, or as in the trace with neither."""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def label(self) -> str:
        """Name in tables."""
        if self.concurrency is not None:
            return f"{self.concurrency} client{'s' * (self.concurrency > 1)}"
        return "as recorded" if self.rate is None else f"{self.rate:g} req/s"

    @property
    def default_requests(self) -> int:
        """How many requests are sent if the user gives neither a number nor a duration."""
        if self.concurrency is not None:
            return max(FEWEST_REQUESTS, REQUESTS_PER_CLIENT * self.concurrency)
        rate = self.rate or math.inf
        return max(FEWEST_REQUESTS, round(SECONDS_OF_ARRIVALS * rate)) if math.isfinite(rate) else REQUESTS_AT_ONCE


class ServeSettings(msgspec.Struct, kw_only=True):
    """What the user wants measured."""

    url: str
    loads: list[Load]
    prompt: Lengths
    output: Lengths
    model: str | None = None
    requests: int | None = None
    duration: float | None = None
    warm_up: int = 4
    prefixes: SharedPrefixes | None = None
    trace: Path | None = None
    trace_format: str = "auto"
    time_scale: float = 1.0
    length_scale: float = 1.0
    chat: bool = False
    text: bool = False
    tokenizer: Path | None = None
    vocab_size: int | None = None
    seed: int = 0
    prompt_seed: int | None = None
    limits: dict[str, float] = {}
    ignore_eos: bool = True
    temperature: float = 0.0
    headers: dict[str, str] = {}
    timeout: float = 600.0


class Measured(msgspec.Struct):
    """One load with its figures."""

    load: Load
    summary: Summary
    client_cpu: float
    """Share of one core that this client used."""
    outcomes: list[Outcome]


class ServeRun(msgspec.Struct):
    """All that was measured."""

    options: ServerOptions
    vocab_size: int
    prompt_seed: int
    measured: list[Measured] = []
    interrupted: bool = False


def run(settings: ServeSettings, console: Console) -> ServeRun:
    """Measure every load in turn; Ctrl-C ends it with what has been measured.

    Raises:
        ConfigError: a value that cannot work. EngineError: no server, or one that answers no request at all.
    """
    url = parse_url(settings.url)
    trace = read_trace(settings.trace, settings.trace_format, settings.requests) if settings.trace is not None else []
    trace = scale_trace(trace, settings.time_scale, settings.length_scale)
    if (settings.chat or settings.tokenizer is not None) and not settings.text:
        raise ConfigError("the chat endpoint and --tokenizer need prompts of text: --prompt-form text")
    prompt_seed = settings.prompt_seed if settings.prompt_seed is not None else secrets.randbits(32)
    texts = text_prompts(settings.tokenizer, prompt_seed) if settings.text else None
    with Probe(url, settings.headers) as probe:
        names = [settings.model] if settings.model is not None else probe.models()
        options = ServerOptions(
            url=url,
            model=choose_model(names, settings.url),
            chat=settings.chat,
            headers=settings.headers,
            timeout=settings.timeout,
            ignore_eos=settings.ignore_eos,
            temperature=settings.temperature,
        )
        options, vocab_size = probe.accepted(options, _small_prompt(texts), settings.vocab_size)
    if settings.ignore_eos and not options.ignore_eos:
        console.print("the server refuses ignore_eos: answers may be shorter than asked for", style="yellow")
    prompts = texts or TokenPrompts(vocab_size, prompt_seed)
    result = ServeRun(options, vocab_size, prompt_seed)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # every request under way has a socket
    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=REFRESHES_PER_SECOND,
        ) as progress,
    ):
        try:
            runner.run(_warm_up(settings, options, prompts, trace))
            for number, load in enumerate(settings.loads, start=1):
                requests = _requests(settings, prompts, trace, load, number)
                measured = _measure(runner, settings, options, load, requests, progress)
                result.measured.append(measured)
                if measured.summary.unfinished:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            result.interrupted = True
    return result


def _measure(
    runner: asyncio.Runner,
    settings: ServeSettings,
    options: ServerOptions,
    load: Load,
    requests: Iterator[Request],
    progress: Progress,
) -> Measured:
    """Put one load on the server; an interrupted one has unfinished requests."""
    total = settings.requests or (None if settings.duration is not None else load.default_requests)
    bar = progress.add_task(load.label, total=total)
    outcomes: list[Outcome] = []
    gc.collect()
    gc.freeze()  # so that no long collection holds up the arrival of tokens
    cpu, start = time.process_time(), time.perf_counter()
    try:
        runner.run(_put_load(settings, options, load, requests, outcomes, lambda: progress.advance(bar)))
    except KeyboardInterrupt:
        if not any(outcome.finished for outcome in outcomes):
            raise
    finally:
        gc.unfreeze()
    cpu_share = (time.process_time() - cpu) / (time.perf_counter() - start)
    progress.remove_task(bar)
    return Measured(load, summarise(outcomes, settings.limits), cpu_share, outcomes)


async def _put_load(
    settings: ServeSettings,
    options: ServerOptions,
    load: Load,
    requests: Iterator[Request],
    outcomes: list[Outcome],
    tick: Tick,
) -> None:
    client = BenchClient(options)
    try:
        if load.concurrency is not None:
            await closed_loop(client, requests, load.concurrency, outcomes, duration=settings.duration, tick=tick)
        else:
            await open_loop(client, requests, outcomes, duration=settings.duration, tick=tick)
    finally:
        client.close()


async def _warm_up(
    settings: ServeSettings, options: ServerOptions, prompts: PromptSource, trace: list[TraceEntry]
) -> None:
    """Send some requests at once whose figures do not count.

    Raises:
        EngineError: none of them was answered.
    """
    if settings.warm_up == 0:
        return
    source = _requests(settings, prompts, trace, Load(concurrency=settings.warm_up), variant=0)
    outcomes: list[Outcome] = []
    client = BenchClient(options)
    try:
        await closed_loop(client, itertools.islice(source, settings.warm_up), settings.warm_up, outcomes)
    finally:
        client.close()
    if all(outcome.error is not None for outcome in outcomes):
        failed = outcomes[0]
        raise EngineError(f"the server answered none of {len(outcomes)} requests: {failed.error}: {failed.detail}")


def _requests(
    settings: ServeSettings, prompts: PromptSource, trace: list[TraceEntry], load: Load, variant: int
) -> Iterator[Request]:
    """The requests of one load; those of different `variant` have different tokens."""
    limit = settings.requests or (None if settings.duration is not None or trace else load.default_requests)
    if trace:
        entries = recorded(prompts, trace, variant=variant, length_scale=settings.length_scale)
        if load.rate is None:
            return itertools.islice(entries, limit)
        arrivals = poisson_arrivals(load.rate, settings.seed)
        pairs = zip(entries, arrivals, strict=False)
        return itertools.islice((msgspec.structs.replace(entry, arrival=at) for entry, at in pairs), limit)
    endless = synthetic(
        prompts,
        settings.prompt,
        settings.output,
        poisson_arrivals(load.rate if load.rate is not None else math.inf, settings.seed),
        seed=settings.seed,
        variant=variant,
        prefixes=settings.prefixes,
    )
    return itertools.islice(endless, limit)


def _small_prompt(texts: TextPrompts | None) -> Callable[[int], Prompt]:
    """For the probe: a prompt with the last token of a vocabulary of a given size, or a text."""
    if texts is not None:
        return lambda vocab_size: texts.finish(texts.draw(4, 0))
    return lambda vocab_size: [vocab_size - 1]
