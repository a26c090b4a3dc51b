"""The same comparison as `routing.replicas` in simulated time: as many replicas as wanted, exact and without noise.

    python -m raytroupe.deploy.bench.routing.simulate --replicas 1000 --rate 4000 --requests 20000
    python -m raytroupe.deploy.bench.routing.simulate --replicas 1000 --trace mooncake.jsonl --time-scale 0.01

Schedulers, block pools and our router are the real ones; a step takes what `--curve` says. Of the other routers, round
robin and power of two choices are written anew here; `longest-match` stands for those that guess from what they have
sent where, as Ray's PrefixCacheAffinityRouter does. A trace is replayed at its own times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ....cluster.errors import ConfigError
from ....cluster.latency_class import DEFAULT_TARGETS
from ....cluster.replica_report import StepCurve
from ....cluster.scheduler_config import SchedulerConfig
from ..options import JsonFile, parse_names
from ..prompts import TokenPrompts
from ..report import Column, Report, describe, run_as_program
from ..traces import read_trace, scale_trace
from ..workload import Request, poisson_arrivals, recorded
from .comparison_report import COLUMNS, comparison_rows
from .figures import run_figures
from .replicas import parse_workloads
from .routed_server import ReplicaCounts
from .simulated_routers import CHOOSERS, Clock
from .simulation import Chooser, Simulation
from .verdicts import lines, verdicts
from .workloads import WORKLOADS, Sizes

BLOCK_SIZE = 16
VOCAB_SIZE = 32_000
Draw = Callable[[], Iterator[Request]]
"""Gives the requests of a workload, the same each time."""


def main(
    replicas: Annotated[int, typer.Option(min=1)] = 4,
    requests: Annotated[int, typer.Option(min=1, help="In one run; of a trace, its first ones.")] = 1024,
    clients: Annotated[int, typer.Option(min=1, help="Requests at once, without --rate or --trace.")] = 64,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests a second, instead of clients.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Replay this file, Mooncake's or BurstGPT's.")] = None,
    time_scale: Annotated[float, typer.Option(min=1e-9, help="Multiplies the times of a trace.")] = 1.0,
    length_scale: Annotated[float, typer.Option(min=1e-9, help="Multiplies the lengths of a trace.")] = 1.0,
    workloads: Annotated[str, typer.Option(help=f"all, or some of {', '.join(WORKLOADS)}.")] = "shared,unshared,hot",
    groups: Annotated[int, typer.Option(min=1, help="Common prefixes.")] = 80,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 768,
    tail: Annotated[int, typer.Option(min=1, help="Tokens of a prompt that no other has.")] = 48,
    output: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 16,
    cache_blocks: Annotated[int, typer.Option(min=16, help=f"Blocks of {BLOCK_SIZE} tokens in a replica.")] = 1536,
    curve: Annotated[str, typer.Option(help="Milliseconds: a step, a prompt token, a decoding row.")] = "1.5,0.08,0.2",
    routers: Annotated[str, typer.Option(help=f"all, or some of {', '.join(CHOOSERS)}.")] = "all",
    seed: int = 0,
    json_file: JsonFile = None,
) -> None:
    """Compare routers in simulated time."""
    if trace is not None and rate is not None:
        raise ConfigError("--rate and --trace: a trace has its own times; --time-scale 0.5 makes it twice as fast")
    steps = parse_curve(curve)
    drawn: dict[str, Draw]
    if trace is not None:
        entries = scale_trace(read_trace(trace, limit=requests), time_scale, length_scale)
        drawn = {"trace": lambda: recorded(prompts(), entries, variant=0, length_scale=length_scale)}
        longest, requests = max(entry.prompt_len + entry.output_len for entry in entries), len(entries)
        load = f"{entries[-1].arrival:.1f} s of {trace.name}"
    else:
        sizes = Sizes(requests=requests, groups=groups, prefix_len=prefix, tail_len=tail, output_len=output)
        drawn = {
            name: lambda name=name, variant=variant: WORKLOADS[name](sizes, prompts(), seed, variant)  # type: ignore[misc]
            for variant, name in enumerate(parse_workloads(workloads))
        }
        longest, load = prefix + tail + output, f"{clients} clients" if rate is None else f"{rate:g} requests/s"

    def prompts() -> TokenPrompts:
        return TokenPrompts(VOCAB_SIZE, seed)

    config = simulated_config(cache_blocks, longest)
    console = Console(width=max(130, Console().width))
    found: dict[str, dict[str, Any]] = {}
    decisions: list[float] = []
    for workload, draw in drawn.items():
        found[workload] = {}
        for name in parse_names("--routers", routers, CHOOSERS):
            began = time.perf_counter()
            choosers: list[Any] = []

            def make(clock: Clock, kind: Any = CHOOSERS[name], made: list[Any] = choosers) -> Chooser:
                made.append(kind(replicas, config, clock))
                return made[0]

            simulation = Simulation(replicas, config, steps, make)
            if trace is not None:
                simulation.open_loop(((one.arrival, one) for one in draw()), DEFAULT_TARGETS["default"])
            elif rate is not None:
                arrivals = zip(poisson_arrivals(rate, seed), draw(), strict=False)
                simulation.open_loop(arrivals, DEFAULT_TARGETS["default"])
            else:
                simulation.closed_loop(draw(), clients, DEFAULT_TARGETS["default"])
            nothing = {str(index): _counts(index, None) for index in range(replicas)}
            counts = {str(index): _counts(index, simulation) for index in range(replicas)}
            found[workload][name] = run_figures(simulation.outcomes, nothing, counts)
            decisions += choosers[0].decision_seconds
            console.print(
                f"{workload} {name}: {simulation.now:.1f} s simulated in {time.perf_counter() - began:.1f} s",
                highlight=False,
            )
    rows = []
    for workload, of_routers in found.items():
        table = comparison_rows(of_routers)
        console.print(Report("routing.simulate", {}, COLUMNS, table).table(workload))
        rows += [{"workload": workload, **row} for row in table]
    notes: dict[str, Any] = {"verdicts": lines(verdicts(found))}
    if decisions:
        decisions.sort()
        notes["decision_us"] = {
            share: 1e6 * decisions[min(len(decisions) - 1, int(len(decisions) * share))] for share in (0.5, 0.99)
        }
        console.print(f"our decisions: {notes['decision_us'][0.5]:.0f} µs p50, {notes['decision_us'][0.99]:.0f} µs p99")
    for line in notes["verdicts"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    settings: dict[str, Any] = {"replicas": replicas, "requests": requests, "load": load}
    if trace is None:
        settings |= {"groups": groups, "prefix": prefix, "tail": tail, "output": output}
    else:
        settings |= {"length_scale": length_scale, "time_scale": time_scale}
    settings |= {"cache_blocks": cache_blocks, "curve_ms": curve, "seed": seed}
    console.print(describe(settings), highlight=False, soft_wrap=True)
    if json_file is not None:
        Report("routing.simulate", settings, [Column("workload", "workload"), *COLUMNS], rows, notes).write(json_file)


def parse_curve(text: str) -> StepCurve:
    """
    Raises:
        ConfigError: not three numbers of milliseconds.
    """
    try:
        base, prefill_token, decode_row = (float(part) / 1e3 for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--curve {text!r}: three numbers of milliseconds such as 1.5,0.08,0.2") from None
    if min(base, prefill_token, decode_row) < 0 or base + prefill_token == 0:
        raise ConfigError(f"--curve {text!r}: a step takes time, and none of the three may be negative")
    return StepCurve(base, prefill_token, decode_row)


def simulated_config(cache_blocks: int, longest: int) -> SchedulerConfig:
    """The scheduler of a replica for requests of up to `longest` tokens.

    Raises:
        ConfigError: the cache does not hold such a request.
    """
    if -(-longest // BLOCK_SIZE) + 1 > cache_blocks:
        raise ConfigError(
            f"--cache-blocks {cache_blocks}: a request has up to {longest} tokens, which need more blocks"
        )
    return SchedulerConfig(
        num_blocks=cache_blocks + 1,
        block_size=BLOCK_SIZE,
        max_model_len=longest + BLOCK_SIZE,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        max_num_waiting=100_000,
    )


def _counts(index: int, simulation: Simulation | None) -> ReplicaCounts:
    if simulation is None:
        return ReplicaCounts(str(index), 0, 0, 0, 0, 0, 0)
    stats, blocks = simulation.replicas[index].scheduler.stats, simulation.replicas[index].scheduler.kv.pool.capacity
    return ReplicaCounts(
        str(index),
        blocks,
        stats.prefix_queries,
        stats.prefix_hits,
        stats.prompt_tokens,
        stats.generated_tokens,
        stats.preemptions,
    )


if __name__ == "__main__":
    run_as_program(main)
