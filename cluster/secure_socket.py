"""ZeroMQ sockets between the processes of a cluster: encrypted, and open to one peer key only.

Whoever binds a socket makes two CURVE key pairs: its own, and one for its peers. The `Endpoint` that describes the
socket carries what a peer needs, and travels through Ray, whose authentication guards it. A peer without the handed
out key is refused by the ZAP handler (RFC 27) of the binding context before it can send a byte.
"""

from __future__ import annotations

from typing import Any, Self

import zmq
from zmq.auth.thread import ThreadAuthenticator

from .messages import Endpoint

_HEARTBEAT_MS = 2_000
_HEARTBEAT_TIMEOUT_MS = 10_000
_EVERYWHERE = {"", "*", "0.0.0.0", "::", "[::]"}


class SecureContext:
    """Makes CURVE sockets. One per process and purpose; close it when its sockets are no longer needed.

    Sockets are plain `zmq.Socket`s: use each in one thread only.
    """

    def __init__(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._peer_keys: dict[str, bytes] = {}

    def bind(self, kind: int, host: str) -> tuple[zmq.Socket[Any], Endpoint]:
        """Bind a socket of type `kind` (`zmq.PULL` …) to a free port of `host`: loopback or the node's Ray address."""
        if host in _EVERYWHERE:
            raise ValueError(f"refusing to listen on all interfaces ({host!r}); give the address of one")
        server_public, server_secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        self._start_authenticator()
        domain = f"socket-{len(self._peer_keys)}"
        self._peer_keys[domain] = client_public
        assert self._authenticator is not None
        self._authenticator.configure_curve_callback(domain, self)
        socket = self._socket(kind)
        socket.zap_domain = domain.encode()
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = server_public, server_secret
        if ":" in host:
            socket.ipv6, host = True, f"[{host}]"
        port = socket.bind_to_random_port(f"tcp://{host}")
        endpoint = Endpoint(
            f"tcp://{host}:{port}", server_public.decode(), client_public.decode(), client_secret.decode()
        )
        return socket, endpoint

    def connect(
        self, kind: int, endpoint: Endpoint, *, identity: bytes | None = None, watch: int = 0
    ) -> zmq.Socket[Any]:
        """Connect a socket of type `kind` to `endpoint`; returns at once, the handshake goes on in the background.

        Args:
            kind: `zmq.PUSH` …
            endpoint: what to connect to.
            identity: how a ROUTER addresses this socket.
            watch: connection events (`zmq.EVENT_DISCONNECTED` …) that `socket.get_monitor_socket()` gives. The peer is
                then asked every few seconds for a sign of life, so that the loss of its machine is an event too.
        """
        socket = self._socket(kind)
        if watch:
            socket.heartbeat_ivl, socket.heartbeat_timeout = _HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS
            socket.get_monitor_socket(watch)
        if identity is not None:
            socket.identity = identity
        socket.curve_serverkey = endpoint.server_public_key.encode()
        socket.curve_publickey = endpoint.client_public_key.encode()
        socket.curve_secretkey = endpoint.client_secret_key.encode()
        socket.ipv6 = "[" in endpoint.address
        socket.connect(endpoint.address)
        return socket

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client key may connect to a bound socket (called by pyzmq's authenticator)."""
        return self._peer_keys.get(domain) == key

    def close(self) -> None:
        """Close all sockets; what they have not sent within a second is lost."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self._context.destroy(linger=1000)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _socket(self, kind: int) -> zmq.Socket[Any]:
        """A socket without high-water marks: what is in flight is bounded by the scheduler, and nothing may be lost."""
        socket = self._context.socket(kind)
        socket.sndhwm = socket.rcvhwm = 0
        socket.linger = 1000
        return socket

    def _start_authenticator(self) -> None:
        if self._authenticator is None:
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
