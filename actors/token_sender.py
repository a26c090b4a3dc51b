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
PATIENT_SECONDS = 0.2
"""The same for requests that yield to others: nobody reads along."""
PATIENT_LANES = 8
"""Over so many times within that interval they are spread, so that an ingress never gets all their tokens at once."""
FEW_OUTPUTS = 8
"""So few do not wait: with little to send, nobody needs the time that a message saves."""
KEEP_SECONDS = 60.0
"""An ingress without requests keeps its connection so long, which saves the next request the CURVE handshake."""


class _Lane:
    """Outputs to one ingress that travel together."""

    __slots__ = ("interval_s", "next_message", "outlet", "timer", "waiting")

    def __init__(self, outlet: _Outlet, interval_s: float, now: float) -> None:
        self.outlet = outlet
        self.interval_s = interval_s
        self.waiting: dict[str, TokenOutput] = {}
        """By request, all that waits for the next message."""
        self.next_message = now
        """What is not urgent waits until then, …"""
        self.timer: asyncio.TimerHandle | None = None
        """… which this one watches."""

    def put(self, output: TokenOutput) -> None:
        """Let an output wait."""
        before = self.waiting.setdefault(output.request_id, output)
        if before is not output:
            before.absorb(output)

    def take(self, now: float) -> list[TokenOutput]:
        """All that waits; `now` is the time of a message."""
        self.stop_timer()
        self.next_message = now + self.interval_s
        outputs = [*self.waiting.values()]
        self.waiting.clear()
        return outputs

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class _Outlet(IngressConnection):
    """The connection to one ingress, and what waits for it."""

    def __init__(self, context: SecureContext, endpoint: Endpoint, now: float, intervals: list[float]) -> None:
        super().__init__(context, endpoint, now)
        self.requests = 0
        self.last_used = now
        self.steady, *self.patient = (_Lane(self, interval, now) for interval in intervals)
        self.lanes = [self.steady, *self.patient]
        self.urgent: list[TokenOutput] = []
        """For a message at once."""

    def lane(self, patient: bool) -> _Lane:
        """Of a new request."""
        self.requests += 1
        return self.patient[self.requests % len(self.patient)] if patient else self.steady

    def close(self, linger_ms: int) -> None:
        """Close the connection, after at most `linger_ms` for what is queued."""
        for lane in self.lanes:
            lane.stop_timer()
        super().close(linger_ms)


class TokenSender:
    """Sends every request's outputs to the ingress that it came from. Use it in one thread only.

    Args:
        clock: seconds of a monotonic clock.
        interval_s: an ingress gets a message no more often than that; the first and the last tokens of a request do
            not wait. 0: every step sends, also outside of an event loop.
        patient_s: the same for requests that are patient.
        few_outputs: fewer than this do not wait either.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        interval_s: float = 0.0,
        patient_s: float = 0.0,
        few_outputs: int = 0,
    ) -> None:
        self._context = SecureContext()
        self._encoder = msgspec.msgpack.Encoder()
        self._clock = clock
        self._intervals = [interval_s, *[max(interval_s, patient_s)] * PATIENT_LANES]
        self._few_outputs = few_outputs
        self._outlets: dict[Endpoint, _Outlet] = {}
        self._by_request: dict[str, _Lane] = {}

    def register(self, request_id: str, endpoint: Endpoint, *, patient: bool = False) -> None:
        """From now on the outputs of `request_id` go to `endpoint`, a PULL socket."""
        outlet = self._outlets.get(endpoint)
        if outlet is None:
            self._close_unused()
            outlet = self._outlets[endpoint] = _Outlet(self._context, endpoint, self._clock(), self._intervals)
        self._by_request[request_id] = outlet.lane(patient)

    def unregister(self, request_id: str) -> None:
        """Outputs of `request_id` that come later are dropped."""
        lane = self._by_request.pop(request_id, None)
        if lane is not None:
            lane.outlet.requests -= 1
            lane.outlet.last_used = self._clock()

    def publish(self, outputs: list[TokenOutput]) -> None:
        """Send the outputs of one step, with those that wait: one `TokenBatch` to each ingress whose time has come.

        The outputs belong to the sender from now on, which joins those of a request that wait.
        """
        for output in outputs:
            lane = self._by_request.get(output.request_id)
            if lane is None:
                continue
            lane.put(output)
            if output.index == 0 or output.finish_reason is not None or not output.tokens:
                lane.outlet.urgent.append(lane.waiting.pop(output.request_id))
        now = self._clock()
        for outlet in self._outlets.values():
            few = sum(len(lane.waiting) for lane in outlet.lanes) < self._few_outputs
            due = [lane for lane in outlet.lanes if lane.waiting and (few or now >= lane.next_message)]
            if outlet.urgent and outlet.steady not in due:
                due.append(outlet.steady)  # a message that is sent anyway takes along what is not patient
            if due:
                self._send(outlet, due, now)
            for lane in outlet.lanes:
                if lane.waiting and lane.timer is None:
                    loop = asyncio.get_running_loop()
                    lane.timer = loop.call_later(lane.next_message - now, self._flush, lane)

    def _flush(self, lane: _Lane) -> None:
        self._send(lane.outlet, [lane], self._clock())

    def _send(self, outlet: _Outlet, lanes: list[_Lane], now: float) -> None:
        """Send what is urgent, and all that waits in `lanes`."""
        outputs = [output for lane in lanes for output in lane.take(now)] + outlet.urgent
        outlet.urgent = []
        # Without a high-water mark the message is queued in memory even if the ingress reads nothing; its size is
        # bounded by the requests of that ingress, which end or are aborted when it dies (`drop_unreachable`).
        outlet.send(self._encoder.encode(TokenBatch(outputs)))

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
        orphans = [request_id for request_id, lane in self._by_request.items() if lane.outlet in gone]
        for request_id in orphans:
            del self._by_request[request_id]
        return orphans

    def close(self) -> None:
        """Close all connections, after a moment for what is queued."""
        for outlet in self._outlets.values():
            if any(lane.waiting for lane in outlet.lanes):
                self._send(outlet, outlet.lanes, self._clock())
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
