"""Prefix caches behind four routers: ours, round robin, power of two choices, and Ray's PrefixCacheAffinityRouter.

    python -m raytroupe.deploy.bench.routing.replicas --json figures.json
    python -m raytroupe.deploy.bench.routing.replicas --routers troupe,prefix-affinity --workloads hot --repeats 1

Every router gets a server of its own with real replicas (`server.py`), the same configuration and the same requests in
the same order, from a closed loop of clients. Every run has tokens that no run before it had, so caches are cold. The
routers take turns, forwards and backwards, so that a drift of the machine meets all alike; the table has the medians.
`workloads.py` says what is sent, `verdicts.py` what is aimed at.

Ray's router is there twice, with its defaults and with the threshold of Ray's guide, in a thread of its own as Serve
has it (`server.py`). It is reported as not measured where Ray cannot import it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import secrets
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop
import yaml
from rich.console import Console

from ....cluster.errors import EngineError
from ....cluster.model_spec import load_spec
from ....cluster.topology import all_layouts, kv_bytes_per_block
from ...model_folder import find_model_folder
from ..client import BenchClient, Outcome, ServerOptions, parse_url
from ..command import EXIT_INTERRUPTED
from ..load import closed_loop
from ..options import JsonFile, Repeats, parse_names
from ..prompts import TokenPrompts
from ..report import describe, run_as_program
from .comparison_report import Runs, publish_comparison
from .every_token import EVERY_TOKEN
from .figures import RunFigures, run_figures
from .routed_server import ReplicaCounts, RoutedServer
from .routers import OURS, parse_routers
from .workloads import WORKLOADS, Sizes, unshared

BLOCK_SIZE = 16
DTYPE = "float32"
"""Stated, because the size of a block follows from it."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison."""

    model: str
    replicas: int
    clients: int
    cache_blocks: int
    workloads: list[str]
    sizes: Sizes
    warm_up: int
    repeats: int
    seed: int
    prompt_seed: int


def main(
    model: Annotated[str, typer.Option(help="Folder or name of the model.")] = "demo-small",
    routers: Annotated[str, typer.Option(help="all, or names separated by commas.")] = "all",
    workloads: Annotated[str, typer.Option(help=f"all, or some of {', '.join(WORKLOADS)}.")] = "shared,unshared,hot",
    replicas: Annotated[int, typer.Option(min=2, help="Replicas of the model.")] = 4,
    clients: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="In one run.")] = 1024,
    groups: Annotated[int, typer.Option(min=1, help="Common prefixes.")] = 80,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 768,
    tail: Annotated[int, typer.Option(min=1, help="Tokens of a prompt that no other has.")] = 48,
    output: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 16,
    cache_blocks: Annotated[int, typer.Option(min=16, help=f"Blocks of {BLOCK_SIZE} tokens in a replica.")] = 1536,
    repeats: Repeats = 3,
    seed: Annotated[int, typer.Option(help="Of the order of the groups.")] = 0,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, to see that it runs; the figures mean nothing.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Compare routers over real replicas."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is ended then, too
    sizes = Sizes(requests=requests, groups=groups, prefix_len=prefix, tail_len=tail, output_len=output)
    if quick:
        sizes = Sizes(requests=96, groups=24, prefix_len=96, tail_len=16, output_len=4)
        clients, cache_blocks, repeats = 16, 96, 1
    sizes.check(cache_blocks * BLOCK_SIZE, replicas)
    plan = Plan(
        model=model,
        replicas=replicas,
        clients=clients,
        cache_blocks=cache_blocks,
        workloads=parse_workloads(workloads),
        sizes=sizes,
        warm_up=clients if quick else 2 * clients,
        repeats=repeats,
        seed=seed,
        prompt_seed=secrets.randbits(32),
    )
    console = Console()
    runs: Runs = {workload: {} for workload in plan.workloads}
    missing: dict[str, str] = {}
    failure: BaseException | None = None
    try:
        compare(plan, parse_routers(routers), runs, missing, console)
    except (KeyboardInterrupt, EngineError) as error:  # what has been measured is of use all the same
        failure = error
    settings = {**msgspec.to_builtins(plan), "sizes": describe(msgspec.to_builtins(plan.sizes)), "dtype": DTYPE}
    publish_comparison(settings, runs, missing, failure is not None, json_file)
    if isinstance(failure, EngineError):
        raise failure
    if failure is not None:
        raise typer.Exit(EXIT_INTERRUPTED)


def parse_workloads(text: str) -> list[str]:
    """See `parse_names`."""
    return parse_names("--workloads", text, WORKLOADS)


# --- measuring --------------------------------------------------------------------------------------------------------


def compare(plan: Plan, routers: list[str], runs: Runs, missing: dict[str, str], console: Console) -> None:
    """Fill `runs`, and `missing` with why a router could not be measured. What an interrupt leaves is whole runs.

    Raises:
        EngineError: our own server does not start, or one fails while it is measured.
    """
    with configuration(plan) as config:
        for repeat in range(plan.repeats):
            for router in routers if repeat % 2 == 0 else routers[::-1]:
                if router in missing:
                    continue
                server = RoutedServer(router, config)
                with contextlib.ExitStack() as running:
                    try:
                        with console.status(f"repeat {repeat + 1} of {plan.repeats}: starting {router}"):
                            running.enter_context(server)
                    except EngineError as error:
                        if router == OURS:
                            raise
                        missing[router] = str(error)
                        continue
                    for workload, figures in measure(plan, server, router, repeat, console):
                        runs[workload].setdefault(router, []).append(figures)


def measure(
    plan: Plan, server: RoutedServer, router: str, repeat: int, console: Console
) -> Iterator[tuple[str, RunFigures]]:
    """Run every workload on a server that has just started."""
    spec = load_spec(find_model_folder(plan.model))
    prompts = TokenPrompts(spec.vocab_size, plan.prompt_seed)
    options = ServerOptions(url=parse_url(server.address), model=server.model_names()[0], fields=EVERY_TOKEN)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        warm_up = msgspec.structs.replace(plan.sizes, requests=plan.warm_up)
        variant = repeat * (len(WORKLOADS) + 1)
        runner.run(put_load(options, [*unshared(warm_up, prompts, plan.seed, variant)], plan.clients))
        check_cache(plan, counts := server.replica_counts())
        for workload in plan.workloads:
            variant += 1
            requests = [*WORKLOADS[workload](plan.sizes, prompts, plan.seed + repeat, variant)]
            with console.status(f"repeat {repeat + 1} of {plan.repeats}: {router}, {workload}"):
                outcomes = runner.run(put_load(options, requests, plan.clients))
            before, counts = counts, server.replica_counts()
            figures = run_figures(outcomes, before, counts)
            console.print(
                f"{repeat + 1}/{plan.repeats} {router:<18} {workload:<13} hits {figures.hit_rate:6.1%}  "
                f"{figures.output_tokens_per_second:8,.0f} tok/s  TTFT p50 {figures.ttft_p50 or 0:7,.1f} ms",
                highlight=False,
                soft_wrap=True,
            )
            yield workload, figures


async def put_load(options: ServerOptions, requests: list[Any], clients: int) -> list[Outcome]:
    """Send `requests` from so many clients."""
    outcomes: list[Outcome] = []
    client = BenchClient(options)
    gc.collect()
    gc.freeze()  # so that no long collection holds up the arrival of tokens
    try:
        await closed_loop(client, iter(requests), clients, outcomes)
    finally:
        client.close()
        gc.unfreeze()
    return outcomes


@contextlib.contextmanager
def configuration(plan: Plan) -> Iterator[Path]:
    """A configuration file for the servers: replicas with one thread each and the planned number of blocks."""
    folder = find_model_folder(plan.model)
    (layout,) = all_layouts(1, 1)
    bytes_per_block = kv_bytes_per_block(load_spec(folder), layout, BLOCK_SIZE, dtype_bytes=4)
    longest = plan.sizes.prompt_len + plan.sizes.output_len
    fields = {
        "model": str(folder),
        "replicas": plan.replicas,
        "num_threads": 1,
        "dtype": DTYPE,
        "block_size": BLOCK_SIZE,
        "max_model_len": -(-longest // BLOCK_SIZE) * BLOCK_SIZE,
        "kv_cache_memory": (plan.cache_blocks + 1) * bytes_per_block,  # one is the null block
    }
    with tempfile.TemporaryDirectory(prefix="routing-") as name:
        file = Path(name) / "models.yaml"
        file.write_text(yaml.safe_dump({"models": [fields]}))
        yield file


def check_cache(plan: Plan, counts: Mapping[str, ReplicaCounts]) -> None:
    """
    Raises:
        EngineError: the replicas are not as planned.
    """
    sizes = {count.blocks_total for count in counts.values()}
    if len(counts) != plan.replicas or sizes != {plan.cache_blocks}:
        raise EngineError(
            f"planned were {plan.replicas} replicas with {plan.cache_blocks} blocks; there are {len(counts)} with "
            f"{', '.join(map(str, sorted(sizes)))}"
        )


if __name__ == "__main__":
    run_as_program(main)
