"""A connection to an ingress that is watched, so that an ingress that has died is noticed."""

from __future__ import annotations

import zmq
from zmq.utils.monitor import parse_monitor_message

from ..cluster.messages import Endpoint
from ..cluster.secure_socket import SecureContext

CONNECT_SECONDS = 10.0
"""A new connection may take so long."""
RECONNECT_SECONDS = 2.0
"""A broken connection may take so long to come back; ZeroMQ tries ten times a second."""


class IngressConnection:
    """A PUSH socket connected to an ingress's PULL socket. All times are by the caller's clock."""

    def __init__(self, context: SecureContext, endpoint: Endpoint, now: float) -> None:
        self.socket = context.connect(zmq.PUSH, endpoint, watch=zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self.dead_at: float | None = now + CONNECT_SECONDS
        """When the ingress is given up unless it connects before; None: it is connected."""

    def is_gone(self, now: float) -> bool:
        """Take in what has happened to the connection; whether to give it up. Call it about twice a second."""
        monitor = self.socket.get_monitor_socket()
        while monitor.poll(0):
            event = parse_monitor_message(monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.dead_at = None
            elif self.dead_at is None:
                self.dead_at = now + RECONNECT_SECONDS
        return self.dead_at is not None and self.dead_at <= now

    def send(self, message: bytes) -> None:
        """Queue a message; what an ingress does not read waits in memory until the ingress is found to be gone."""
        self.socket.send(message, zmq.DONTWAIT)

    def close(self, linger_ms: int) -> None:
        """Close the connection, after at most `linger_ms` for what is queued."""
        self.socket.disable_monitor()
        self.socket.close(linger_ms)
