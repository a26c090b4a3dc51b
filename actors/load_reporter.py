"""What a replica tells the ingresses about itself: which blocks its cache gains and loses, its load, who has arrived.

Every ingress that has subscribed gets the same numbered reports, so each is encoded once. Reports are paced: what
happens within some milliseconds shares one, and a replica to which nothing happens repeats its load twice a second, by
which an ingress notices that the last report was lost.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

import msgspec

from ..cluster.block_hash import short_hashes
from ..cluster.block_pool import BlockPool
from ..cluster.messages import Endpoint
from ..cluster.replica_report import ReplicaLoad, ReplicaReport
from ..cluster.secure_socket import SecureContext
from .ingress_connection import IngressConnection

REPORT_SECONDS = 0.1
"""Between two reports: a shorter step does not pay for one of its own."""
HEARTBEAT_SECONDS = 0.5
_REMEMBERED_ARRIVALS = 1024
"""Ids of requests that a snapshot repeats, for an ingress that has missed the report of their arrival."""


class LoadReporter:
    """Reports of one replica. Use it on the engine's event loop.

    Args:
        model: its served name.
        replica: Serve's unique id of the replica.
        pool: where the blocks' events come from; it records them only while an ingress is subscribed.
        load: the load at the moment of the call.
        clock: seconds of a monotonic clock.
        interval_s: reports follow each other no faster. 0: every `publish` sends, also outside of an event loop.
    """

    def __init__(
        self,
        model: str,
        replica: str,
        pool: BlockPool,
        load: Callable[[], ReplicaLoad],
        clock: Callable[[], float] = time.monotonic,
        *,
        interval_s: float = REPORT_SECONDS,
    ) -> None:
        self._model = model
        self._replica = replica
        self._pool = pool
        self._load = load
        self._clock = clock
        self._interval_s = interval_s
        self._context = SecureContext()
        self._encoder = msgspec.msgpack.Encoder()
        self._connections: dict[Endpoint, IngressConnection] = {}
        self._number = 0
        self._accepted: list[str] = []
        self._arrivals: deque[str] = deque(maxlen=_REMEMBERED_ARRIVALS)
        self._last_load: ReplicaLoad | None = None
        self._last_report = -float("inf")
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_subscribers(self) -> int:
        """Ingresses that get reports."""
        return len(self._connections)

    def subscribe(self, endpoint: Endpoint) -> None:
        """Send a snapshot to an ingress's PULL socket, and every report from now on.

        An ingress that has missed a report subscribes again, and gets another snapshot.
        """
        if self._connections:
            # The others learn first what the snapshot contains already: no change is told twice to anybody.
            self._send(even_if_unchanged=False)
        else:
            self._pool.record_events(True)
        connection = self._connections.get(endpoint)
        if connection is None:
            connection = self._connections[endpoint] = IngressConnection(self._context, endpoint, self._clock())
        connection.send(
            self._encoder.encode(
                ReplicaReport(
                    model=self._model,
                    replica=self._replica,
                    number=self._number,
                    load=self._load(),
                    snapshot=True,
                    stored=pack_hashes(self._pool.cached_contents()),
                    accepted=list(self._arrivals),
                )
            )
        )

    def accept(self, request_id: str) -> None:
        """A request has arrived, and is part of the load. Call `publish` then."""
        self._arrivals.append(request_id)
        if self._connections:
            self._accepted.append(request_id)

    def publish(self) -> None:
        """Something may have changed: report it, now or when the time for the next report has come."""
        if not self._connections or self._timer is not None:
            return
        wait = self._last_report + self._interval_s - self._clock()
        if wait <= 0:
            self._send(even_if_unchanged=False)
        else:
            self._timer = asyncio.get_running_loop().call_later(wait, self._send_waiting)

    def watch(self) -> None:
        """Drop ingresses that are gone, and give the others a sign of life. Call it every `HEARTBEAT_SECONDS`."""
        now = self._clock()
        for endpoint, connection in list(self._connections.items()):
            if connection.is_gone(now):
                self._connections.pop(endpoint).close(linger_ms=0)
        if not self._connections:
            self._accepted.clear()
            self._pool.record_events(False)
        elif now - self._last_report > HEARTBEAT_SECONDS / 2:
            self._send(even_if_unchanged=True)

    def close(self) -> None:
        """Close all connections, after a moment for what is queued."""
        if self._timer is not None:
            self._timer.cancel()
        self._pool.record_events(False)
        for connection in self._connections.values():
            connection.close(linger_ms=1000)
        self._connections.clear()
        self._context.close()

    def _send_waiting(self) -> None:
        self._timer = None
        self._send(even_if_unchanged=False)

    def _send(self, *, even_if_unchanged: bool) -> None:
        """Send what has changed since the last report to all ingresses."""
        stored, evicted = self._pool.drain_events()
        load = self._load()
        changed = stored or evicted or self._accepted or load != self._last_load
        if not (changed or even_if_unchanged):
            return
        self._number += 1
        report = ReplicaReport(
            model=self._model,
            replica=self._replica,
            number=self._number,
            load=load,
            stored=pack_hashes(stored),
            evicted=pack_hashes(evicted),
            accepted=self._accepted,
        )
        message = self._encoder.encode(report)
        self._accepted = []
        self._last_load = load
        self._last_report = self._clock()
        for connection in self._connections.values():
            connection.send(message)


def pack_hashes(digests: list[bytes]) -> bytes:
    """Their short hashes, as a report has them."""
    return short_hashes(digests).astype("<i8", copy=False).tobytes()
