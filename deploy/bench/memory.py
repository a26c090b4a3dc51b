"""Memory of a shard's process besides its weights and KV cache: under load, and the most that it ever had.

    python -m raytroupe.deploy.make_bench_model bench-models/llama-254m
    python -m raytroupe.deploy.bench.memory bench-models/llama-254m

A real server is started, and asked for more tokens than its KV cache holds, in prompts as long as a step takes, so that
every KV block has been touched and all workspaces are as large as they get. The peak shows what loading needs: a second
copy of the weights, if there ever was one. Besides what is subtracted there remain the interpreter, torch, Ray, the
buffers of a step and whatever loading has left behind. Pages of libraries that other processes use as well count in
full.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import psutil
import typer

from ...cluster.errors import EngineError
from ...cluster.model_spec import load_spec
from .options import JsonFile
from .report import Column, Report, publish, run_as_program
from .serve_process import ServeProcess

MIB = 2**20
UNITS = {"KiB": 2**10, "MiB": MIB, "GiB": 2**30}
TARGET_MIB = 400
"""At most so much besides weights and KV cache."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TOUCH_FACTOR = 1.25
"""Tokens asked for, as a multiple of those that the KV cache holds."""
COLUMNS = [
    Column("when", "MiB"),
    Column("resident", "resident", ".0f"),
    Column("anonymous", "anonymous", ".0f"),
    Column("shared", "shared", ".0f"),
    Column("file", "files", ".0f"),
    Column("weights", "weights", ".0f"),
    Column("kv_cache", "KV cache", ".0f"),
    Column("besides", "besides", ".0f"),
    Column("ratio", f"besides / {TARGET_MIB} MiB", ".2f"),
]


class ProcessMemory(msgspec.Struct, frozen=True):
    """Resident memory of a process, in bytes."""

    resident: int
    anonymous: int
    shared: int
    """Shared memory, of which the kernel also says that it belongs to a file."""
    file: int
    peak: int
    """Most that was ever resident."""


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the model.")],
    kv_cache_mib: Annotated[int, typer.Option(min=1, help="Size of the KV cache, in MiB.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(min=16, help="Tokens computed in one step.")] = 1024,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    json_file: JsonFile = None,
) -> None:
    """Measure the memory of a shard's process."""
    spec = load_spec(model)
    kv_cache = kv_cache_mib * MIB
    kv_tokens = kv_cache // (2 * len(spec.layers) * spec.num_kv_heads * spec.head_dim * DTYPE_BYTES[dtype])
    prompt_len = min(max_num_batched_tokens, spec.max_position_embeddings // 2, kv_tokens // 2)
    arguments = [str(model), "--dtype", dtype, "--kv-cache-memory", f"{kv_cache_mib}MiB"]
    arguments += ["--max-model-len", str(2 * prompt_len), "--max-num-batched-tokens", str(max_num_batched_tokens)]
    with ServeProcess(*arguments) as server:
        shard = shard_process(server.pid)
        for prompt in prompts(round(kv_tokens * TOUCH_FACTOR), prompt_len, spec.vocab_size):
            ask(server, prompt)
        loaded = read_memory(shard)
        weights = reported_weights(line for _, line in server.lines)
    rows = [
        row("under load", loaded, loaded.resident, weights, kv_cache),
        row("peak", loaded, loaded.peak, weights, kv_cache),
    ]
    settings = {
        "model": model.name,
        "dtype": dtype,
        "kv_cache_mib": kv_cache_mib,
        "max_num_batched_tokens": max_num_batched_tokens,
        "prompt_len": prompt_len,
    }
    publish(Report("memory", settings, COLUMNS, rows), json_file)


def reported_weights(lines: Iterable[str]) -> float:
    """Bytes of the weights as the server's startup message has them: it knows how small they have become.

    Raises:
        EngineError: there is no such message.
    """
    for line in lines:
        if found := re.search(r"\(weights ([\d.]+) ([KMG]iB)", line):
            return float(found[1]) * UNITS[found[2]]
    raise EngineError("the server printed no line with '(weights …)', the memory that its weights take")


def row(when: str, memory: ProcessMemory, resident: int, weights: float, kv_cache: int) -> dict[str, float | str]:
    """One line of the table: `resident` bytes of a process, less what it is there for."""
    besides = resident - weights - kv_cache
    figures = {
        "resident": resident,
        "anonymous": memory.anonymous,
        "shared": memory.shared,
        "file": memory.file,
        "weights": weights,
        "kv_cache": kv_cache,
        "besides": besides,
    }
    if resident == memory.peak and memory.peak != memory.resident:
        del figures["anonymous"], figures["shared"], figures["file"]  # the kernel keeps no peaks of these
    in_mib = {name: size / MIB for name, size in figures.items()}
    return {"when": when, **in_mib, "ratio": besides / MIB / TARGET_MIB}


def read_memory(process: psutil.Process, root: Path = Path("/proc")) -> ProcessMemory:
    """What the kernel says of a process now."""
    folder = root / str(process.pid)
    rollup, status = _kib_fields(folder / "smaps_rollup"), _kib_fields(folder / "status")
    resident, anonymous = rollup["Rss"], rollup["Anonymous"]
    shared = status["RssShmem"]
    return ProcessMemory(resident, anonymous, shared, resident - anonymous - shared, max(status["VmHWM"], resident))


def shard_process(server_pid: int) -> psutil.Process:
    """The only shard below a server.

    Raises:
        EngineError: there is none, or several.
    """
    family = psutil.Process(server_pid).children(recursive=True)
    shards = [process for process in family if "ShardActor" in title(process)]
    if len(shards) != 1:
        raise EngineError(f"{len(shards)} shard processes below process {server_pid}; one was expected")
    return shards[0]


def title(process: psutil.Process) -> str:
    """What a process calls itself; nothing if it has ended meanwhile."""
    try:
        return "".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def prompts(num_tokens: int, prompt_len: int, vocab_size: int) -> list[list[int]]:
    """Random prompts of `num_tokens` in all, at least; no two begin alike."""
    numbers = random.Random(0)
    count = -(-num_tokens // prompt_len)
    return [[numbers.randrange(2, vocab_size) for _ in range(prompt_len)] for _ in range(count)]


def ask(server: ServeProcess, prompt: list[int]) -> None:
    """Have a prompt computed."""
    body = {"model": server.model_names()[0], "prompt": prompt, "max_tokens": 2, "temperature": 0}
    httpx.post(f"{server.address}/v1/completions", json=body, timeout=300).raise_for_status()


def _kib_fields(file: Path) -> dict[str, int]:
    """Bytes by name, of the lines that give a number of kB."""
    fields = {}
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if unit == "kB":
            fields[name] = int(number) * 1024
    return fields


if __name__ == "__main__":
    run_as_program(main)
