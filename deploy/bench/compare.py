"""Troupe's engine and its peers on the same points, in one session on one machine.

    python -m raytroupe.deploy.bench.compare MODEL --repeats 3 \\
        --peer llama.cpp=VENV/bin/python:MODEL.gguf --peer openvino=VENV/bin/python:CONVERTED \\
        --peer vllm=VENV/bin/python:MODEL --peer transformers=VENV/bin/python:MODEL

Every side runs in a process of its own, under its own interpreter, by a script of `peers/`; `peers/README.md` says how
to make the environments. The sides take turns, once per repeat, so that a drift of the machine meets all alike; the
table has the medians. A peer may appear more than once with a label: `--peer llama.cpp/q8_0=…`.

Prefill is prompt tokens over the time of the load with one output token; decode is the further tokens over the time
that they add.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from ...cluster.errors import ConfigError, EngineError
from .options import THREADS, JsonFile, Repeats, Threads
from .peers.points import CONCURRENCY, HIGHEST_TOKEN, OUTPUT_LEN, PROMPT_LEN
from .report import Column, Report, publish, run_as_program

PEERS = Path(__file__).parent / "peers"
SCRIPTS = {
    "llama.cpp": "run_llama_cpp.py",
    "openvino": "run_openvino.py",
    "vllm": "run_vllm.py",
    "transformers": "run_transformers.py",
}
OURS = "troupe"
RUN_SECONDS = 1800.0
SPEEDS = {"decode": "decode_tok_s", "prefill": "prefill_tok_s", "total": "total_tok_s"}
"""Speed in the table → key in a script's line."""

Figures = dict[int, dict[str, float]]
"""Concurrency → key of a script's line → value."""


class Side(msgspec.Struct, frozen=True):
    """One competitor: its name in the table, and the command that measures it."""

    name: str
    command: tuple[str, ...]


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the model, for Troupe.")],
    peer: Annotated[list[str] | None, typer.Option(metavar="NAME=PYTHON:MODEL", help="May be repeated.")] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once, separated by commas.")] = ",".join(
        map(str, CONCURRENCY)
    ),
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens of every request.")] = PROMPT_LEN,
    output_len: Annotated[int, typer.Option("--output", min=2, help="Generated tokens of every request.")] = OUTPUT_LEN,
    threads: Threads = THREADS,
    repeats: Repeats = 3,
    vocab_size: Annotated[int, typer.Option(min=11, help="Prompt tokens are below this.")] = HIGHEST_TOKEN,
    field: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Field of Troupe's model; may be repeated.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure Troupe and its peers alternately."""
    counts = parse_counts(concurrency)
    if not (model / "config.json").exists():
        raise ConfigError(f"{model}: no config.json there; name a model folder, or write one with make_bench_model")
    options = ["--concurrency", ",".join(map(str, counts)), "--prompt", str(prompt), "--output", str(output_len)]
    options += ["--threads", str(threads), "--vocab-size", str(vocab_size)]
    fields = [part for pair in field or [] for part in ("--field", pair)]
    ours = (sys.executable, "-m", f"{__package__}.peers.run_troupe", str(model), *options, *fields)
    sides = [Side(OURS, ours), *(parse_peer(given, options) for given in peer or [])]
    if len({side.name for side in sides}) < len(sides):
        raise ConfigError("two sides have the same name; give them labels: --peer llama.cpp/q8_0=…")
    runs: dict[str, list[Figures]] = {side.name: [] for side in sides}
    lines: list[dict[str, Any]] = []
    console = Console(stderr=True)
    try:
        for repeat in range(repeats):
            for side in sides:
                console.print(f"repeat {repeat + 1} of {repeats}: {side.name}", style="dim", highlight=False)
                measured = run_side(side)
                lines += [{"side": side.name, "repeat": repeat, **line} for line in measured]
                runs[side.name].append({line["concurrency"]: line for line in measured})
    except KeyboardInterrupt:
        console.print("interrupted: the table has what was measured", style="yellow")
        runs = {name: of_side for name, of_side in runs.items() if of_side}
    settings = {
        "model": model.name,
        "prompt": prompt,
        "output": output_len,
        "threads": threads,
        "repeats": repeats,
    }
    if fields:
        settings["fields"] = " ".join(field or [])
    publish(Report("compare", settings, columns(runs), rows(runs, counts), {"runs": lines}), json_file)


def parse_counts(text: str) -> list[int]:
    """`1,8,32` to numbers.

    Raises:
        ConfigError: not positive numbers separated by commas.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise ConfigError(f"--concurrency {text}: give numbers from 1 on, separated by commas, such as 1,8,32")
    return counts


def parse_peer(given: str, options: list[str]) -> Side:
    """`NAME[/LABEL]=PYTHON:MODEL` to a side.

    Raises:
        ConfigError: not of that form, an unknown peer, or no such interpreter or model.
    """
    name, _, rest = given.partition("=")
    python, _, model = rest.partition(":")
    if not (name and python and model):
        raise ConfigError(f"--peer {given}: write NAME=PYTHON:MODEL, such as openvino=venv/bin/python:converted")
    script = SCRIPTS.get(name.partition("/")[0])
    if script is None:
        raise ConfigError(f"--peer {given}: unknown peer; known: {', '.join(SCRIPTS)}")
    if not os.access(python, os.X_OK):
        raise ConfigError(f"--peer {given}: {python} is not an interpreter; see {PEERS / 'README.md'}")
    if not Path(model).exists():
        raise ConfigError(f"--peer {given}: {model} does not exist; see {PEERS / 'README.md'} for the conversion")
    return Side(name, (python, str(PEERS / script), model, *options))


def run_side(side: Side) -> list[dict[str, Any]]:
    """Run one side once; a dict per point, as `peers/points.py` prints them.

    Raises:
        EngineError: it failed or printed no figures; with the end of what it said.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    try:
        done = subprocess.run(side.command, capture_output=True, text=True, env=environment, timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        raise EngineError(f"{side.name} was not done after {RUN_SECONDS:.0f} s") from None
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"peer"')]
    if done.returncode != 0 or not lines:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise EngineError(f"{side.name} ended with code {done.returncode}: {' '.join(side.command)}\n{said}")
    return lines


def columns(sides: Iterable[str]) -> list[Column]:
    """Columns of the table for these sides."""
    return [
        Column("what", "tokens/s"),
        Column("concurrency", "at once", "d"),
        *(Column(name, name, ".1f") for name in sides),
        Column("best_peer", "best peer"),
        Column("ratio", f"{OURS} / best peer", ".2f"),
    ]


def rows(runs: dict[str, list[Figures]], counts: list[int]) -> list[dict[str, Any]]:
    """A row per speed and concurrency: the median of every side, and the ratio of ours to the best other side."""
    table = []
    for what, key in SPEEDS.items():
        for count in counts:
            medians = {name: statistics.median(run[count][key] for run in of_side) for name, of_side in runs.items()}
            row: dict[str, Any] = {"what": what, "concurrency": count, **medians}
            peers = {name: value for name, value in medians.items() if name != OURS}
            if peers and OURS in medians:
                row["best_peer"] = max(peers, key=peers.__getitem__)
                row["ratio"] = medians[OURS] / peers[row["best_peer"]]
            table.append(row)
    return table


if __name__ == "__main__":
    run_as_program(main)
