"""The same comparison as `routing.replicas` in simulated time: as many replicas as wanted, exact and without noise.

    python -m raytroupe.deploy.bench.routing.simulate --replicas 1000 --requests 20000

Schedulers, block pools and our router are the real ones; a step takes what `--curve` says. Of the other routers, round
robin and power of two choices are written anew here; `longest-match` stands for those that guess from what they have
sent where, as Ray's PrefixCacheAffinityRouter does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from ....cluster.block_hash import short_block_hashes
from ....cluster.latency_class import DEFAULT_TARGETS
from ....cluster.messages import ModelCard
from ....cluster.replica_report import ReplicaLoad, StepCurve
from ....cluster.request import EngineRequest
from ....cluster.router_config import RouterConfig
from ....cluster.scheduler import SchedulerConfig
from ....router.router import Router
from ..options import JsonFile, parse_names
from ..prompts import TokenPrompts
from ..report import Column, Report, describe, run_as_program
from ..workload import poisson_arrivals
from .comparison_report import COLUMNS, comparison_rows
from .figures import run_figures
from .replicas import parse_workloads
from .routed_server import ReplicaCounts
from .routers import OURS
from .simulation import Chooser, Simulation
from .verdicts import lines, verdicts
from .workloads import WORKLOADS, Sizes

BLOCK_SIZE = 16
MODEL = "simulated"
Clock = Callable[[], float]


class Ours:
    """The router of an ingress, fed with the replicas' reports."""

    def __init__(self, replicas: int, config: SchedulerConfig, clock: Clock) -> None:
        card = ModelCard(
            name=MODEL,
            path="",
            max_model_len=config.max_model_len,
            vocab_size=0,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_waiting=config.max_num_waiting,
        )
        self._names = [f"replica-{index}" for index in range(replicas)]
        self._index_of = {name: index for index, name in enumerate(self._names)}
        blocks = replicas * config.num_blocks
        self.router = Router([card], RouterConfig(index_blocks=blocks), clock=clock)
        self.router.set_replicas(MODEL, self._names)
        self.decision_seconds: list[float] = []

    def choose(self, request: EngineRequest) -> int:
        began = time.perf_counter()
        decision = self.router.place(MODEL, request)
        self.router.reserve(request.request_id, decision, request.latency)
        self.decision_seconds.append(time.perf_counter() - began)
        assert decision.replica is not None, "all replicas are known from the beginning"
        return self._index_of[decision.replica]

    def arrived(self, request_id: str, replica: int) -> None:
        pass  # the report says so

    def started(self, request_id: str) -> None:
        self.router.started(request_id)

    def ended(self, request_id: str, replica: int) -> None:
        self.router.release(request_id)

    def report(
        self, replica: int, load: ReplicaLoad, stored: list[int], evicted: list[int], accepted: list[str]
    ) -> None:
        name = self._names[replica]
        self.router.index.stored(name, stored)
        self.router.index.evicted(name, evicted)
        self.router.fleet.report(name, load, accepted)


class _Deaf:
    """Routers that know only what they have sent themselves."""

    def __init__(self, replicas: int, config: SchedulerConfig, clock: Clock) -> None:
        self.ongoing = [0] * replicas
        self.block_size = config.block_size
        self.rng = random.Random(0)
        self.decision_seconds: list[float] = []
        self.next = 0

    def arrived(self, request_id: str, replica: int) -> None:
        pass

    def started(self, request_id: str) -> None:
        pass

    def ended(self, request_id: str, replica: int) -> None:
        self.ongoing[replica] -= 1

    def report(
        self, replica: int, load: ReplicaLoad, stored: list[int], evicted: list[int], accepted: list[str]
    ) -> None:
        pass

    def choose(self, request: EngineRequest) -> int:
        index = self.pick(request)
        self.ongoing[index] += 1
        return index

    def pick(self, request: EngineRequest) -> int:
        raise NotImplementedError

    def less_loaded_of_two(self) -> int:
        if len(self.ongoing) == 1:
            return 0
        return min(self.rng.sample(range(len(self.ongoing)), 2), key=self.ongoing.__getitem__)


class RoundRobin(_Deaf):
    """One after the other."""

    def pick(self, request: EngineRequest) -> int:
        self.next = (self.next + 1) % len(self.ongoing)
        return self.next


class PowerOfTwo(_Deaf):
    """The one with fewer ongoing requests of two at random."""

    def pick(self, request: EngineRequest) -> int:
        return self.less_loaded_of_two()


class LongestMatch(_Deaf):
    """Where the longest beginning of the prompt was sent before; if that is less than a tenth of it, where the fewest
    blocks were sent. Nothing is ever forgotten, as nobody says what was evicted."""

    def __init__(self, replicas: int, config: SchedulerConfig, clock: Clock) -> None:
        super().__init__(replicas, config, clock)
        self._sent: list[set[int]] = [set() for _ in range(replicas)]

    def pick(self, request: EngineRequest) -> int:
        hashes = short_block_hashes(request.prompt, self.block_size, "")
        matched = [self._matched(known, hashes) for known in self._sent]
        best = max(matched)
        if 10 * best < len(hashes):
            index = min(range(len(self._sent)), key=lambda replica: len(self._sent[replica]))
        else:
            index = self.rng.choice([replica for replica, count in enumerate(matched) if count == best])
        self._sent[index].update(hashes)
        return index

    @staticmethod
    def _matched(known: set[int], hashes: list[int]) -> int:
        return next((count for count, content in enumerate(hashes) if content not in known), len(hashes))


CHOOSERS: dict[str, type[Ours] | type[_Deaf]] = {
    OURS: Ours,
    "round-robin": RoundRobin,
    "power-of-two": PowerOfTwo,
    "longest-match": LongestMatch,
}


def main(
    replicas: Annotated[int, typer.Option(min=1)] = 4,
    requests: Annotated[int, typer.Option(min=1, help="In one run.")] = 1024,
    clients: Annotated[int, typer.Option(min=1, help="Requests at once, without --rate.")] = 64,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests a second, instead of clients.")] = None,
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
    base, prefill_token, decode_row = (float(part) / 1e3 for part in curve.split(","))
    steps = StepCurve(base, prefill_token, decode_row)
    config = SchedulerConfig(
        num_blocks=cache_blocks + 1,
        block_size=BLOCK_SIZE,
        max_model_len=prefix + tail + output + BLOCK_SIZE,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        max_num_waiting=100_000,
    )
    sizes = Sizes(requests=requests, groups=groups, prefix_len=prefix, tail_len=tail, output_len=output)
    names = parse_names("--routers", routers, CHOOSERS)
    found: dict[str, dict[str, Any]] = {}
    console = Console(width=max(130, Console().width))
    decisions: list[float] = []
    for variant, workload in enumerate(parse_workloads(workloads)):
        found[workload] = {}
        for name in names:
            began = time.perf_counter()
            choosers: list[Any] = []

            def make(clock: Clock, kind: Any = CHOOSERS[name], made: list[Any] = choosers) -> Chooser:
                made.append(kind(replicas, config, clock))
                return made[0]

            simulation = Simulation(replicas, config, steps, make)
            drawn = WORKLOADS[workload](sizes, TokenPrompts(32_000, seed), seed, variant)
            if rate is None:
                simulation.closed_loop(drawn, clients, DEFAULT_TARGETS["default"])
            else:
                simulation.open_loop(zip(poisson_arrivals(rate, seed), drawn, strict=False), DEFAULT_TARGETS["default"])
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
    settings = {
        "replicas": replicas,
        "requests": requests,
        "load": f"{clients} clients" if rate is None else f"{rate:g} requests/s",
        "groups": groups,
        "prefix": prefix,
        "tail": tail,
        "output": output,
        "cache_blocks": cache_blocks,
        "curve_ms": curve,
        "seed": seed,
    }
    console.print(describe(settings), highlight=False, soft_wrap=True)
    if json_file is not None:
        Report("routing.simulate", settings, [Column("workload", "workload"), *COLUMNS], rows, notes).write(json_file)


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
