"""`troupe serve` whose replicas are chosen by another request router; all else is the same application.

    python -m raytroupe.deploy.bench.routing.server --router round-robin --config FILE --port 8000

Beside the API it answers `GET /` on `--stats-port` with `engine_stats` of every replica of the first model, as JSON.
"""

from __future__ import annotations

import functools
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ....actors.placement import Capacity
from ....cluster.config import ServeConfig, load_config
from ....cluster.errors import TroupeError
from ...cli import merge_configuration
from ...local_cluster import LocalCluster
from ...local_machine import check_ports, local_capacity
from ...quiet_output import quiet_output
from ...served_model import ServedModel, resolve_models
from ...serving import Serving
from ...supervisor import supervise
from ..report import run_as_program
from .routers import ROUTERS, Contender, parse_routers

STATS_SECONDS = 30.0


class ThreadedRouterCluster(LocalCluster):
    """A cluster in which handles route in a thread of their own, as Serve does by default and `troupe serve` does not.

    Ray's PrefixCacheAffinityRouter asks its prefix tree, another process, with calls that block their thread: in the
    ingress's own it would hold up all streams.
    """

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"}


class RoutedServing(Serving):
    """Serves with another request router.

    Args:
        router: how replicas are chosen.
    """

    def __init__(self, config: ServeConfig, models: list[ServedModel], capacity: Capacity, router: Contender) -> None:
        super().__init__(config, models, capacity)
        self.request_router = router.import_path
        if router.blocks:
            self.cluster.stop()  # it has a folder only
            self.cluster = ThreadedRouterCluster(capacity, config.dashboard_port)

    def _deploy(self) -> Future[None]:
        # Not before: what Ray and Serve read from the environment when they are imported is set by now.
        from ... import app

        if self.request_router is not None:
            app.build_application = functools.partial(app.build_application, request_router=self.request_router)
        return super()._deploy()


def main(
    router: Annotated[str, typer.Option(help=f"One of {', '.join(ROUTERS)}.")],
    config: Annotated[Path, typer.Option(help="YAML file, as for `troupe serve`.")],
    port: Annotated[int, typer.Option(help="Of the API.")],
    dashboard_port: Annotated[int, typer.Option(help="Of Ray's dashboard.")],
    stats_port: Annotated[int, typer.Option(help="Where to ask for the replicas' counters.")],
) -> None:
    """Serve until interrupted."""
    (name,) = parse_routers(router)
    ports = {"port": port, "dashboard_port": dashboard_port}
    checked = check_ports(load_config(merge_configuration(config, [], {}, ports)))
    raise typer.Exit(supervise(lambda: _serve(checked, ROUTERS[name], stats_port)))


def _serve(config: ServeConfig, router: Contender, stats_port: int) -> int:
    """As the command line does it, without its care for the reader; the exit status."""
    capacity = local_capacity()
    try:
        serving = RoutedServing(config, resolve_models(config.models, capacity), capacity, router)
    except TroupeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        with quiet_output(serving.cluster.log) as terminal:
            serving.start(Console(file=terminal))
            threading.Thread(target=_answer_stats, args=(stats_port, config.models[0].name), daemon=True).start()
            serving.run()
    except TroupeError as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        serving.stop()
    return 1


def _answer_stats(port: int, model: str) -> None:
    """Never returns. Handles are bound to the loop in which they are made, so one loop does it all."""
    import uvicorn
    from fastapi import FastAPI
    from ray import serve

    from ...app import APPLICATION, deployment_name

    api = FastAPI()

    @functools.cache
    def handle() -> Any:
        return serve.get_deployment_handle(deployment_name(model), APPLICATION)

    @api.get("/")
    async def stats() -> list[dict[str, Any]]:
        return await handle().broadcast("engine_stats").results_async(timeout_s=STATS_SECONDS)

    uvicorn.Server(uvicorn.Config(api, port=port, log_config=None, access_log=False)).run()


if __name__ == "__main__":
    run_as_program(main)
