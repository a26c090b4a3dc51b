"""The life of `troupe serve`: start the cluster, deploy, wait until requests are answered, keep the user informed."""

from __future__ import annotations

import http.client
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import msgspec
import zmq
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ..actors.placement import Capacity
from ..cluster.config import ServeConfig
from ..cluster.errors import EngineError, TroupeError
from ..cluster.kv_memory import format_bytes
from ..cluster.messages import LoadProgress, Notice, Report, StartFailed
from ..cluster.secure_socket import SecureContext
from .local_cluster import LocalCluster
from .served_model import ServedModel

POLL_SECONDS = 0.1
STATUS_SECONDS = 0.5
HEALTH_SECONDS = 60.0
"""For the proxy to find the ingress after Serve has declared it running."""


class Serving:
    """One application on one local cluster, from start to end."""

    def __init__(self, config: ServeConfig, models: Sequence[ServedModel], capacity: Capacity) -> None:
        self._config = config
        self._models = models
        self._console = Console()
        self._context = SecureContext()
        self._reports, self._listener = self._context.bind(zmq.PULL, "127.0.0.1")
        self._decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
        self.cluster = LocalCluster(capacity, config.dashboard_port)

    def start(self, console: Console) -> None:
        """Start everything and say on `console` where it is to be found; returns when the API answers.

        Raises:
            EngineError: Ray or a replica cannot start; the message is the cause.
        """
        self._console = console
        began = time.monotonic()
        with self._console.status("starting Ray"), failing_as("Ray does not start"):
            self.cluster.start()
        self._say(f"Ray is up ({time.monotonic() - began:.1f} s)")
        with failing_as("Ray Serve does not start"):
            with self._console.status("starting Ray Serve"):
                started = self._deploy()
            self._await_running(started)
        self._await_health()
        self._say(f"serving after {time.monotonic() - began:.1f} s")
        self.cluster.await_dashboard()
        for line in self._welcome():
            self._say(line)

    def run(self) -> None:
        """Pass on what replicas report, until interrupted.

        Raises:
            EngineError: the cluster has broken down.
        """
        while True:
            self.cluster.check_alive()
            for report in self._take_reports(timeout_seconds=2.0):
                match report:
                    case Notice(text=text, model=model):
                        self._say(f"{model}: {text}")
                    case StartFailed(cause=cause, model=model):
                        self._say(f"{model}: a replica cannot start: {cause}")

    def stop(self, *, keep_logs: bool = False) -> None:
        """End every process of the application and its cluster."""
        self._context.close()
        self.cluster.stop(keep_logs=keep_logs)

    # --- start ----------------------------------------------------------------------------------------------------

    def _deploy(self) -> Future[None]:
        """Start Serve in a thread, and deploy as soon as its controller is there: replicas start while the proxy does.
        The future ends when the proxy listens."""
        from ray import serve
        from ray.serve.schema import LoggingConfig

        from .app import APPLICATION, build_application

        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        thread = ThreadPoolExecutor(1, "serve")
        started = thread.submit(
            serve.start,
            http_options={"host": self._config.host, "port": self._config.port},
            logging_config=quiet,
        )
        thread.shutdown(wait=False)
        while not started.done() and not serve.status().proxies:
            time.sleep(POLL_SECONDS)
        if started.done():
            started.result()
        application = build_application(self._config, self._models, self._listener)
        serve.run_many(
            [serve.RunTarget(application, name=APPLICATION, logging_config=quiet)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        return started

    def _await_running(self, started: Future[None]) -> None:
        """Show the loading of weights until all replicas run and `started` has ended."""
        from ray import serve
        from ray.serve.schema import ApplicationStatus

        from .app import APPLICATION

        next_look = 0.0
        with self._loading_bars() as update:
            while True:
                for report in self._take_reports(POLL_SECONDS):
                    match report:
                        case LoadProgress():
                            update(report)
                        case Notice(text=text, model=model):
                            self._say(f"{model}: {text}")
                        case StartFailed(cause=cause, model=model):
                            raise EngineError(f"{model}: {cause}")
                if time.monotonic() < next_look:
                    continue
                if started.done():
                    started.result()
                application = serve.status().applications.get(APPLICATION)
                if application is not None and application.status == ApplicationStatus.RUNNING:
                    started.result()
                    return
                if application is not None and application.status == ApplicationStatus.DEPLOY_FAILED:
                    raise EngineError(_cause(application.message))
                next_look = time.monotonic() + STATUS_SECONDS

    def _await_health(self) -> None:
        deadline = time.monotonic() + HEALTH_SECONDS
        while time.monotonic() < deadline:
            if self._healthy():
                return
            time.sleep(POLL_SECONDS)
        raise EngineError(f"the API did not become healthy within {HEALTH_SECONDS:.0f} s")

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(reachable(self._config.host), self._config.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    # --- reports --------------------------------------------------------------------------------------------------

    def _take_reports(self, timeout_seconds: float) -> Iterator[Report]:
        """What has been reported; waits for the first one, but not longer than the timeout."""
        if not self._reports.poll(int(timeout_seconds * 1000)):
            return
        while self._reports.poll(0):
            yield self._decoder.decode(self._reports.recv())

    @contextmanager
    def _loading_bars(self) -> Iterator[Callable[[LoadProgress], None]]:
        """One bar per shard on a terminal; gives the function that moves them."""
        bars: dict[tuple[str, str, int], TaskID] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[size]}"))
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as live:
            starting = live.add_task("starting replicas", total=None, size="")

            def update(report: LoadProgress) -> None:
                live.update(starting, visible=False)
                key = (report.model, report.replica, report.rank)
                if key not in bars:
                    bars[key] = live.add_task(f"{report.model} shard {report.rank}", total=report.total_bytes, size="")
                size = f"{format_bytes(report.loaded_bytes)} of {format_bytes(report.total_bytes)}"
                live.update(bars[key], completed=report.loaded_bytes, size=size)

            yield update

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    # --- for the user ---------------------------------------------------------------------------------------------

    def _welcome(self) -> list[str]:
        """Addresses, and a command to try."""
        host = reachable(self._config.host)
        address = f"http://{f'[{host}]' if ':' in host else host}:{self._config.port}"
        names = ", ".join(model.card.name for model in self._models)
        body = (
            f'{{"model": "{self._models[0].card.name}", '
            '"messages": [{"role": "user", "content": "Which country has the capital Nairobi?"}]}'
        )
        ray_address = self.cluster.address
        return [
            f"Models     {names}",
            f"API        {address}/v1",
            f"Dashboard  {self.cluster.dashboard_url} (asks for a token: `{self.cluster.token_command()}` prints it)",
            f"Ray        {ray_address} (other drivers: RAY_ADDRESS={ray_address} RAY_AUTH_MODE=token)",
            f"Try        curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
            "Ctrl-C ends it.",
        ]


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Make an error of a library's one of ours, with the line that names the cause."""
    try:
        yield
    except TroupeError:
        raise
    except Exception as error:
        raise EngineError(f"{what}: {_cause(str(error) or type(error).__name__)}") from error


def reachable(host: str) -> str:
    """An address of this machine that reaches a server listening on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _cause(message: str) -> str:
    """The line of an error message of Ray's that names the cause: the last one of a traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no cause given"
