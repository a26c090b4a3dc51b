"""A socket at which messages from schedulers arrive at an ingress."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

from ..cluster.secure_socket import SecureContext

_BURST = 256
"""Messages taken in a row before other tasks get their turn."""


class MessageReceiver:
    """Hands every message to `on_message`, which must neither block nor raise.

    Only processes that hold the endpoint's keys, which travel through Ray, can send here. Use it on one event loop.
    """

    def __init__(self, host: str, on_message: Callable[[bytes], None]) -> None:
        """Bind a socket on `host`, loopback or the node's Ray address, at a free port. Reading begins with `start`."""
        self._on_message = on_message
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context = SecureContext()
        self._socket, self.endpoint = self._context.bind(zmq.PULL, host)

    def start(self) -> None:
        """Begin to read, on the running event loop. Calling it again does nothing."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket.fileno(), self._drain)
            self._loop.call_soon(self._drain)  # the descriptor signals changes only, and messages may wait already

    def close(self) -> None:
        """Stop reading and free the port."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._context.close()

    def _drain(self) -> None:
        """Take in the messages that have arrived."""
        for _ in range(_BURST):
            if self._socket.closed:
                return
            try:
                message = self._socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._on_message(message)
        assert self._loop is not None
        self._loop.call_soon(self._drain)
