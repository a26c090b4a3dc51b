"""CPU time of a streamed token, from the scheduler's outputs to the client's socket, per process.

    python -m raytroupe.deploy.bench.stream --streams 64 --step-ms 25

Three processes, with all the code that a token passes in a cluster except Ray Serve's and the proxy's:

    engine   Scheduler ─ EngineLoop ─ TokenSender   (no model: a step takes `--step-ms` and gives ordinary tokens)
       │ ZeroMQ, CURVE
    ingress  TokenReceiver ─ ReplicaClient ─ build_app ─ uvicorn on uvloop
       │ HTTP over loopback
    client   counts events and reads the usage; it stands for the cheapest client that is possible

CPU time is that of all threads of a process, user and system, while the streams run; what a step costs without
streams is so little that it is not subtracted. `--profile FILE` writes a cProfile of the ingress for `pstats`.
"""

from __future__ import annotations

import asyncio
import collections
import cProfile
import gc
import itertools
import json
import multiprocessing
import random
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import psutil
import typer
import uvicorn
import uvloop

from ...actors.control_calls import ControlCalls
from ...actors.engine_loop import EngineLoop
from ...actors.token_sender import MESSAGE_SECONDS, TokenSender
from ...cluster.errors import EngineError
from ...cluster.messages import GenerateCall, ModelCard
from ...cluster.scheduler import Scheduler
from ...cluster.scheduler_config import SchedulerConfig
from ...cluster.step import StepPlan, StepResult
from ...router.api import build_app
from ...router.metrics import IngressMetrics
from ...router.replica_client import ReplicaClient
from ...router.router import Router
from ...router.token_receiver import TokenReceiver
from .report import Column, Report, publish, run_as_program

MODEL = Path(__file__).parents[1] / "demo_models" / "demo-small"
NAME = "bench"
MAX_LEN = 8192
START_SECONDS = 30.0
COLUMNS = [
    Column("process", "process"),
    Column("us_per_token", "CPU µs per token", ".1f"),
    Column("system_us_per_token", "of it in the kernel", ".1f"),
    Column("share", "share of the sum", ".2f"),
]


def main(
    streams: Annotated[int, typer.Option(help="Streams at once.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of each stream.")] = 400,
    step_ms: Annotated[float, typer.Option(help="Time of an engine step, which gives each stream a token.")] = 25.0,
    repeats: Annotated[int, typer.Option(help="Runs; the table has the medians.")] = 3,
    endpoint: Annotated[str, typer.Option(help="chat/completions or completions.")] = "chat/completions",
    coalesce: Annotated[bool, typer.Option(help="Let steps share messages as a replica does.")] = True,
    profile: Annotated[Path | None, typer.Option(help="Write a profile of the ingress here.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Measure what a streamed token costs each process."""
    if tokens + 64 > MAX_LEN or tokens < 2:
        raise EngineError(f"--tokens {tokens}: give a number from 2 to {MAX_LEN - 64}")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="stream-") as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        calls = str(Path(folder) / "calls")
        ready = spawn.Barrier(3)
        processes = [
            spawn.Process(
                target=run_engine, args=(calls, streams, step_ms / 1e3, coalesce, ready), name="engine", daemon=True
            ),
            spawn.Process(target=run_ingress, args=(calls, listener, profile, ready), name="ingress", daemon=True),
        ]
        for process in processes:
            process.start()
        try:
            try:
                ready.wait(START_SECONDS)
            except threading.BrokenBarrierError:
                raise EngineError(f"the processes were not ready after {START_SECONDS:.0f} s") from None
            runs = uvloop.run(_measure(processes, listener.getsockname()[1], streams, tokens, repeats, endpoint))
        finally:
            for process in processes:
                process.terminate()
                process.join()
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    total = sum(medians[name] for name in ("engine", "ingress", "client"))
    rows = [
        {
            "process": name,
            "us_per_token": medians[name],
            "system_us_per_token": medians[f"{name} system"],
            "share": medians[name] / total,
        }
        for name in ("engine", "ingress", "client")
    ]
    settings = {
        "streams": streams,
        "tokens": tokens,
        "step_ms": step_ms,
        "endpoint": endpoint,
        "coalesce": coalesce,
        "repeats": repeats,
    }
    publish(Report("bench.stream", settings, COLUMNS, rows, {"runs": runs, **medians}), output)
    print(f"{medians['tokens_per_second']:.0f} tokens/s, {medians['events_per_token']:.2f} events per token")


# --- client -----------------------------------------------------------------------------------------------------------


async def _measure(
    processes: list[Any], port: int, streams: int, tokens: int, repeats: int, endpoint: str
) -> list[dict[str, float]]:
    """CPU µs per token of each process, and the rates, of every run; a short run comes first and does not count."""
    await asyncio.gather(*(read_stream(port, endpoint, 20) for _ in range(streams)))
    watched = {process.name: psutil.Process(process.pid) for process in processes} | {"client": psutil.Process()}
    runs = []
    for _ in range(repeats):
        before, begun = {name: process.cpu_times() for name, process in watched.items()}, time.perf_counter()
        events = sum(await asyncio.gather(*(read_stream(port, endpoint, tokens) for _ in range(streams))))
        seconds, count = time.perf_counter() - begun, streams * tokens
        run = {"tokens_per_second": count / seconds, "events_per_token": events / count}
        for name, process in watched.items():
            now, then = process.cpu_times(), before[name]
            run[f"{name} system"] = (now.system - then.system) / count * 1e6
            run[name] = run[f"{name} system"] + (now.user - then.user) / count * 1e6
        runs.append(run)
    return runs


async def read_stream(port: int, endpoint: str, tokens: int) -> int:
    """Stream one answer; the number of events with text.

    Raises:
        EngineError: the answer is not complete.
    """
    body = json.dumps(
        {
            "model": NAME,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"prompt": "Hi"} if endpoint == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}),
        }
    ).encode()
    done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
    transport, _ = await asyncio.get_running_loop().create_connection(lambda: _Counter(done), "127.0.0.1", port)
    head = f"POST /v1/{endpoint} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    events, tail = await done
    start, end = tail.rfind(b'data: {"id"'), tail.rfind(b"}\n\n")
    usage = json.loads(tail[start + len("data: ") : end + 1])["usage"] if 0 <= start < end else None
    if usage is None or usage["completion_tokens"] != tokens:
        raise EngineError(f"asked for {tokens} tokens and got {tail.decode(errors='replace')!r}")
    return events


class _Counter(asyncio.Protocol):
    """Counts server-sent events and keeps the end of the answer."""

    def __init__(self, done: asyncio.Future[tuple[int, bytes]]) -> None:
        self._done = done
        self._events = 0
        self._tail = b""

    def data_received(self, data: bytes) -> None:
        self._events += data.count(b"data: {")
        self._tail = (self._tail + data)[-2048:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._done.set_result((self._events, self._tail))


# --- ingress ----------------------------------------------------------------------------------------------------------


def run_ingress(calls: str, listener: socket.socket, profile: Path | None, ready: Any) -> None:
    """The HTTP face, with connections to `calls` in place of Serve's handle."""
    card = ModelCard(name=NAME, path=str(MODEL), max_model_len=MAX_LEN, vocab_size=_vocabulary_size())
    handle: Any = _Handle(calls)

    async def serve() -> None:
        router = Router([card])
        client = ReplicaClient({NAME: handle}, TokenReceiver("127.0.0.1"), router)
        app = build_app([card], client, router, metrics=IngressMetrics("bench"))
        # The settings of `start_asgi_http_server` in Ray Serve.
        config = uvicorn.Config(app, lifespan="off", access_log=False, log_level=None, log_config=None)
        gc.freeze()  # so does Serve
        ready.wait()
        await uvicorn.Server(config).serve([listener])

    if profile is None:
        uvloop.run(serve())
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn takes it as the end, and then raises it again
    profiler = cProfile.Profile()
    profiler.runcall(uvloop.run, serve())
    profiler.dump_stats(profile)


class _Handle:
    """A deployment handle whose calls go over a Unix socket: the request out, the reply back."""

    deployment_name = NAME

    def __init__(self, path: str) -> None:
        self._path = path
        self.generate = self

    def remote(self, payload: bytes) -> _Response:
        return _Response(self._call(payload))

    async def _call(self, payload: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write(payload)
            writer.write_eof()
            return await reader.read()
        finally:
            writer.close()


class _Response:
    def __init__(self, call: Coroutine[Any, Any, bytes]) -> None:
        self._task = asyncio.ensure_future(call)

    def __await__(self) -> Generator[Any, None, bytes]:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


def _vocabulary_size() -> int:
    return int(json.loads((MODEL / "config.json").read_text())["vocab_size"])


# --- engine -----------------------------------------------------------------------------------------------------------


def run_engine(calls: str, streams: int, step_seconds: float, coalesce: bool, ready: Any) -> None:
    """A scheduler with its loop and its token sender, over steps that only take time."""
    vocabulary = _vocabulary_size()
    numbers = random.Random(0)
    tokens = itertools.cycle([numbers.randrange(300, vocabulary) for _ in range(10_007)])

    async def serve() -> None:
        size = 16
        config = SchedulerConfig(
            num_blocks=streams * (MAX_LEN // size) + 1,
            block_size=size,
            max_model_len=MAX_LEN,
            max_num_seqs=streams,
            max_num_batched_tokens=2048,
        )
        executor = _PacedExecutor(step_seconds, tokens.__next__)
        engine = EngineLoop(Scheduler(config), executor, lambda outputs: control.publish(outputs))
        control = ControlCalls(engine, TokenSender(interval_s=MESSAGE_SECONDS if coalesce else 0.0))

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            call = msgspec.msgpack.decode(await reader.read(), type=GenerateCall)
            writer.write(msgspec.msgpack.encode(await control.serve(call)))
            writer.close()

        async with await asyncio.start_unix_server(answer, calls, backlog=streams):
            ready.wait()
            await engine.run()

    uvloop.run(serve())


class _PacedExecutor:
    """An `Executor` whose steps follow each other at a fixed distance."""

    def __init__(self, step_seconds: float, token: Callable[[], int]) -> None:
        self._step_seconds = step_seconds
        self._token = token
        self._due = 0.0
        self._plans: collections.deque[tuple[float, StepPlan]] = collections.deque()

    def submit(self, plan: StepPlan) -> None:
        self._due = max(self._due, time.perf_counter()) + self._step_seconds
        self._plans.append((self._due, plan))

    async def result(self) -> StepResult:
        due, plan = self._plans.popleft()
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tokens = [self._token() for sampled in plan.samples if sampled]
        return StepResult(plan.step, tokens, None, self._step_seconds, self._step_seconds)

    def close(self) -> None:
        pass


if __name__ == "__main__":
    run_as_program(main)
