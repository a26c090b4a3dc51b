"""Tokens on their way to the ingresses: one message per engine step and ingress, never waiting for a reader."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from ..cluster.messages import Endpoint, TokenBatch
from ..cluster.request import TokenOutput
from ..cluster.secure_socket import SecureContext

KEEP_SECONDS = 60.0
"""An ingress without requests keeps its connection so long, which saves the next request the CURVE handshake."""


class _Outlet:
    """The connection to one ingress."""

    def __init__(self, socket: zmq.Socket[Any], now: float) -> None:
        self.socket = socket
        self.requests = 0
        self.last_used = now
        self.batch: list[TokenOutput] = []


class TokenSender:
    """Sends every request's outputs to the ingress that it came from. Use it in one thread only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = SecureContext()
        self._encoder = msgspec.msgpack.Encoder()
        self._clock = clock
        self._outlets: dict[Endpoint, _Outlet] = {}
        self._by_request: dict[str, _Outlet] = {}

    def register(self, request_id: str, endpoint: Endpoint) -> None:
        """From now on the outputs of `request_id` go to `endpoint`, a PULL socket."""
        outlet = self._outlets.get(endpoint)
        if outlet is None:
            self._close_unused()
            outlet = self._outlets[endpoint] = _Outlet(self._context.connect(zmq.PUSH, endpoint), self._clock())
        outlet.requests += 1
        self._by_request[request_id] = outlet

    def unregister(self, request_id: str) -> None:
        """Outputs of `request_id` that come later are dropped."""
        outlet = self._by_request.pop(request_id, None)
        if outlet is not None:
            outlet.requests -= 1
            outlet.last_used = self._clock()

    def publish(self, outputs: list[TokenOutput]) -> None:
        """Send the outputs of one step: one `TokenBatch` to each ingress that has any."""
        touched: list[_Outlet] = []
        for output in outputs:
            outlet = self._by_request.get(output.request_id)
            if outlet is None:
                continue
            if not outlet.batch:
                touched.append(outlet)
            outlet.batch.append(output)
        for outlet in touched:
            # Without a high-water mark the message is queued in memory even if the ingress reads nothing; its size
            # is bounded by the requests of that ingress, which end or are aborted when it dies.
            outlet.socket.send(self._encoder.encode(TokenBatch(outlet.batch)), zmq.DONTWAIT)
            outlet.batch = []

    def close(self) -> None:
        """Close all connections, after a moment for what is queued."""
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
            self._outlets.pop(endpoint).socket.close()
