"""What one routing decision takes: 4 variants × 64 replicas, an index of a million blocks.

    python -m raytroupe.deploy.bench.routing.decision --json figures.json

A decision is everything between the tokens of a prompt and the name of a replica, reservation included: hashing the
prompt's blocks, the lookup, the classifier, the cost of every candidate. The clock is the process's CPU time, since
what other processes take on a shared machine is no property of the decision; wall time is reported beside it.
"""

from __future__ import annotations

import gc
import random
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from ....cluster.block_hash import short_block_hashes
from ....cluster.latency_class import DEFAULT_TARGETS
from ....cluster.messages import ModelCard
from ....cluster.price import TokenPrices
from ....cluster.replica_report import ReplicaLoad, StepCurve
from ....cluster.router_config import RouterConfig, RuleConfig
from ....router.prompt_features import PromptFacts
from ....router.router import Router
from ..options import JsonFile
from ..prompts import TokenPrompts
from ..report import Column, Report, percentile, publish, run_as_program

BLOCK_SIZE = 16
COLUMNS = [
    Column("prompt_tokens", "prompt", ",.0f"),
    Column("warm", "warm replicas", ".0f"),
    Column("cpu_p50_us", "CPU p50 µs", ",.0f"),
    Column("cpu_p99_us", "p99", ",.0f"),
    Column("wall_p50_us", "wall p50 µs", ",.0f"),
    Column("wall_p99_us", "p99", ",.0f"),
]


def main(
    variants: Annotated[int, typer.Option(min=1)] = 4,
    replicas: Annotated[int, typer.Option(min=1, help="Of each variant.")] = 64,
    blocks: Annotated[int, typer.Option(min=1000, help="In the index.")] = 1_000_000,
    decisions: Annotated[int, typer.Option(min=100, help="Measured for each length of prompt.")] = 5000,
    seed: int = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure the decision."""
    router = full_router(variants, replicas, blocks, seed)
    models = tuple(router.fleet.models)
    facts = PromptFacts(text="Explain the difference between a mutex and a semaphore.", chars=55, prompt_tokens=512)
    rows = []
    for length in (128, 512, 2048):
        rows.append({"prompt_tokens": length, **measure(router, models, facts, length, decisions, seed)})
    settings = {
        "variants": variants,
        "replicas": replicas,
        "blocks": router.index.num_blocks,
        "index_bytes_per_block": round(router.index.memory_bytes() / router.index.num_blocks, 1),
        "decisions": decisions,
    }
    publish(Report("routing.decision", settings, COLUMNS, rows), json_file)
    met = rows[1]["cpu_p99_us"] <= 200
    Console().print(f"{'met   ' if met else 'MISSED'}  512 tokens: CPU p99 at most 200 µs", highlight=False)


def full_router(variants: int, replicas: int, blocks: int, seed: int) -> Router:
    """A router that knows `variants` × `replicas` replicas with random loads and so many blocks in their caches."""
    rng = random.Random(seed)
    cards = [
        ModelCard(
            name=f"variant-{index}",
            path="",
            max_model_len=32_768,
            vocab_size=32_000,
            weight_bytes=10**9 * (index + 1),
            estimated_prices=TokenPrices(1e-8 * (index + 1), 4e-8 * (index + 1), estimated=True),
        )
        for index in range(variants)
    ]
    everything = [card.name for card in cards]
    # A rule lets all variants compete, which is the most work; a pattern that does not match is looked at before.
    rules = [
        RuleConfig(name="code", use=everything[-1:], pattern=r"\bdef \w+\("),
        RuleConfig(name="all", use=everything),
    ]
    router = Router(cards, RouterConfig(rules=rules, index_blocks=blocks + blocks // 10))
    for card in cards:
        names = [f"{card.name}-{index}" for index in range(replicas)]
        router.set_replicas(card.name, names)
        for name in names:
            router.fleet.report(name, random_load(rng))
            share = blocks // (variants * replicas)
            router.index.snapshot(name, [rng.getrandbits(60) for _ in range(share)])
    while router.index.sweep():
        pass
    return router


def random_load(rng: random.Random) -> ReplicaLoad:
    """Of a replica that is neither idle nor full."""
    running, waiting = rng.randrange(60), rng.choice([0, 0, rng.randrange(20)])
    return ReplicaLoad(
        running=running,
        yielding_running=running // 3,
        waiting=waiting,
        yielding_waiting=waiting // 2,
        prefill_tokens=400 * waiting,
        yielding_prefill_tokens=200 * waiting,
        free_blocks=rng.randrange(1, 4000),
        total_blocks=4000,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        curve=StepCurve(0.01 + 0.005 * rng.random(), 1e-4, 2e-4),
        residence=4.0,
    )


def measure(
    router: Router, models: tuple[str, ...], facts: PromptFacts, length: int, decisions: int, seed: int
) -> dict[str, Any]:
    """Microseconds of decisions over prompts of which half is warm at some replicas of every variant."""
    rng = random.Random(f"{seed}/{length}")
    prompts = TokenPrompts(32_000, seed)
    replicas = [state.name for state in router.fleet.states if state is not None]
    warm = 0
    pool = []
    for index in range(64):
        prefix = prompts.draw(length // 2, length, index)
        holders = rng.sample(replicas, rng.choice([0, 1, 4, 16]))
        hashes = short_block_hashes(prefix, BLOCK_SIZE, "")
        for name in holders:
            router.index.stored(name, hashes)
        warm += len(holders)
        pool.append(prefix)
    cpu, wall = [], []
    gc.collect()
    gc.freeze()
    for number in range(decisions + 200):
        tokens = pool[number % len(pool)] + prompts.draw(length - length // 2, length, 1000 + number)
        everywhere = dict.fromkeys(models, tokens)
        began, began_cpu = time.perf_counter(), time.thread_time()
        decision = router.route(models, everywhere, 256, DEFAULT_TARGETS["interactive"], facts, session=f"s{number}")
        router.reserve(f"r{number}", decision, DEFAULT_TARGETS["interactive"], f"s{number}")
        cpu.append(1e6 * (time.thread_time() - began_cpu))
        wall.append(1e6 * (time.perf_counter() - began))
        router.release(f"r{number}")
    gc.unfreeze()
    cpu, wall = cpu[200:], wall[200:]
    return {
        "warm": warm / len(pool),
        "cpu_p50_us": percentile(cpu, 0.5),
        "cpu_p99_us": percentile(cpu, 0.99),
        "wall_p50_us": percentile(wall, 0.5),
        "wall_p99_us": percentile(wall, 0.99),
    }


if __name__ == "__main__":
    run_as_program(main)
