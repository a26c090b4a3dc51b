"""The server with a chosen request router, in a process of its own, and what its replicas have counted."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import msgspec

from ....cluster.errors import EngineError
from ...local_machine import free_ports
from ..serve_process import ServeProcess

PROGRAM = (f"{__name__.rpartition('.')[0]}.server",)
ANSWER_SECONDS = 60.0
RETRY_SECONDS = 0.2


class ReplicaCounts(msgspec.Struct, frozen=True):
    """The part of `SchedulerReplica.engine_stats` that is of use here: totals since the start."""

    replica: str
    blocks_total: int
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the model, but for those computed again after a preemption."""
        return self.prompt_tokens - self.prefix_hits + self.generated_tokens


class RoutedServer(ServeProcess):
    """Starts `routing.server`; used as `ServeProcess` is."""

    def __init__(self, router: str, config: Path) -> None:
        (self._stats_port,) = free_ports(1)
        super().__init__(
            "--router", router, "--config", str(config), "--stats-port", str(self._stats_port), program=PROGRAM
        )

    def replica_counts(self) -> dict[str, ReplicaCounts]:
        """Of every replica, by name.

        Raises:
            EngineError: the server does not tell.
        """
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                answer = httpx.get(f"http://127.0.0.1:{self._stats_port}/", timeout=ANSWER_SECONDS, trust_env=False)
                counts = msgspec.json.decode(answer.raise_for_status().content, type=list[ReplicaCounts])
                return {count.replica: count for count in counts}
            except httpx.HTTPError as error:  # it begins to listen a moment after the API is healthy
                if time.monotonic() > deadline:
                    raise EngineError(f"the server does not tell what its replicas have counted: {error}") from None
                time.sleep(RETRY_SECONDS)
