"""Tokens on their way to the ingresses: one message per engine step and ingress, never waiting for a reader.

Steps that follow each other faster than anybody can read share a message: what a token costs on its way from here to
the client is paid per message, per event and per write, and on a machine without a GPU the shards need that time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from ..cluster.messages import Endpoint, TokenBatch
from ..cluster.request import TokenOutput
from ..cluster.secure_socket import SecureContext
from .ingress_connection import IngressConnection

MESSAGE_SECONDS = 0.02
"""Between messages of a replica to the same ingress: 50 a second look like a steady stream to a reader."""
FEW_OUTPUTS = 8
"""So few do not wait: with little to send, nobody needs the time that a message saves."""
KEEP_SECONDS = 60.0
"""An ingress without requests keeps its connection so long, which saves the next request the CURVE handshake."""


class _Outlet(IngressConnection):
    """The connection to one ingress, and what waits for it."""

    def __init__(self, context: SecureContext, endpoint: Endpoint, now: float) -> None:
        super().__init__(context, endpoint, now)
        self.requests = 0
        self.last_used = now
        self.batch: list[TokenOutput] = []
        """What waits for the next message."""
        self.urgent = False
        """Something in `batch` must not wait."""
        self.next_message = now
        """What is not urgent waits until then, …"""
        self.timer: asyncio.TimerHandle | None = None
        """… which this one watches."""

    def close(self, linger_ms: int) -> None:
        """Close the connection, after at most `linger_ms` for what is queued."""
        if self.timer is not None:
            self.timer.cancel()
        super().close(linger_ms)


class TokenSender:
    """Sends every request's outputs to the ingress that it came from. Use it in one thread only.

    Args:
        clock: seconds of a monotonic clock.
        interval_s: an ingress gets a message no more often than that; the first and the last tokens of a request do
            not wait. 0: every step sends, also outside of an event loop.
        few_outputs: fewer than this do not wait either.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, interval_s: float = 0.0, few_outputs: int = 0
    ) -> None:
        self._context = SecureContext()
        self._encoder = msgspec.msgpack.Encoder()
        self._clock = clock
        self._interval_s = interval_s
        self._few_outputs = few_outputs
        self._outlets: dict[Endpoint, _Outlet] = {}
        self._by_request: dict[str, _Outlet] = {}

    def register(self, request_id: str, endpoint: Endpoint) -> None:
        """From now on the outputs of `request_id` go to `endpoint`, a PULL socket."""
        outlet = self._outlets.get(endpoint)
        if outlet is None:
            self._close_unused()
            outlet = self._outlets[endpoint] = _Outlet(self._context, endpoint, self._clock())
        outlet.requests += 1
        self._by_request[request_id] = outlet

    def unregister(self, request_id: str) -> None:
        """Outputs of `request_id` that come later are dropped."""
        outlet = self._by_request.pop(request_id, None)
        if outlet is not None:
            outlet.requests -= 1
            outlet.last_used = self._clock()

    def publish(self, outputs: list[TokenOutput]) -> None:
        """Send the outputs of one step, with those that wait: one `TokenBatch` to each ingress whose time has come."""
        for output in outputs:
            outlet = self._by_request.get(output.request_id)
            if outlet is not None:
                outlet.batch.append(output)
                if output.index == 0 or output.finish_reason is not None or not output.tokens:
                    outlet.urgent = True
        now = self._clock() if self._interval_s else 0.0
        for outlet in self._outlets.values():
            if not outlet.batch:
                continue
            few = len(outlet.batch) < self._few_outputs
            if not self._interval_s or few or outlet.urgent or now >= outlet.next_message:
                self._send(outlet)
            elif outlet.timer is None:
                loop = asyncio.get_running_loop()
                outlet.timer = loop.call_later(outlet.next_message - now, self._send, outlet)

    def _send(self, outlet: _Outlet) -> None:
        """Send what waits in `outlet`."""
        if outlet.timer is not None:
            outlet.timer.cancel()
            outlet.timer = None
        # Without a high-water mark the message is queued in memory even if the ingress reads nothing; its size is
        # bounded by the requests of that ingress, which end or are aborted when it dies (`drop_unreachable`).
        outlet.send(self._encoder.encode(TokenBatch(outlet.batch)))
        outlet.batch, outlet.urgent = [], False
        if self._interval_s:
            outlet.next_message = self._clock() + self._interval_s

    def drop_unreachable(self) -> list[str]:
        """Close the connections to ingresses that are gone; the requests that came from there, now unregistered.

        Call it about twice a second.
        """
        now = self._clock()
        gone: set[_Outlet] = set()
        for endpoint, outlet in list(self._outlets.items()):
            if outlet.is_gone(now):
                gone.add(outlet)
                self._outlets.pop(endpoint).close(linger_ms=0)
        if not gone:
            return []
        orphans = [request_id for request_id, outlet in self._by_request.items() if outlet in gone]
        for request_id in orphans:
            del self._by_request[request_id]
        return orphans

    def close(self) -> None:
        """Close all connections, after a moment for what is queued."""
        for outlet in self._outlets.values():
            if outlet.batch:
                self._send(outlet)
        self._outlets.clear()
        self._by_request.clear()
        self._context.close()

    @property
    def num_connections(self) -> int:
        """Ingresses that are connected now."""
        return len(self._outlets)

    def _close_unused(self) -> None:
        limit = self._clock() - KEEP_SECONDS
        unused = [key for key, outlet in self._outlets.items() if not outlet.requests and outlet.last_used <= limit]
        for endpoint in unused:
            self._outlets.pop(endpoint).close(linger_ms=1000)
