"""Progress, notices and the cause of a failed start, on their way to the process that started the application.

Ray's own ways are not enough: a constructor's exception comes back as a rendered traceback, a log line goes to a file.
"""

from __future__ import annotations

import time

import msgspec
import zmq

from ..cluster.errors import TroupeError
from ..cluster.messages import Endpoint, LoadProgress, Notice, Report, StartFailed
from ..cluster.secure_socket import SecureContext

_INTERVAL_SECONDS = 0.1


class Reporter:
    """Sends reports and never waits: if the listener is gone, they are lost. Use it in one thread at a time."""

    def __init__(self, listener: Endpoint | None, model: str, replica: str) -> None:
        """Report for one replica of `model` to `listener`, a PULL socket; None: to nobody."""
        self._context = SecureContext()
        self._socket = None if listener is None else self._context.connect(zmq.PUSH, listener)
        self._model = model
        self._replica = replica
        self._last_progress = 0.0

    def progress(self, rank: int, loaded_bytes: int, total_bytes: int) -> None:
        """Weights read so far by one shard; passes on at most ten a second, and always the last."""
        now = time.monotonic()
        if loaded_bytes < total_bytes and now - self._last_progress < _INTERVAL_SECONDS:
            return
        self._last_progress = now
        self._send(LoadProgress(self._model, self._replica, rank, loaded_bytes, total_bytes))

    def notice(self, text: str, *, warning: bool = False) -> None:
        """An event that a user cares about, in one line."""
        self._send(Notice(self._model, text, warning))

    def start_failed(self, error: Exception) -> None:
        """Why this replica cannot start."""
        cause = str(error) if isinstance(error, TroupeError) else f"{type(error).__name__}: {error}"
        self._send(StartFailed(self._model, type(error).__name__, cause))

    def close(self) -> None:
        """Close the connection, after a moment for what is queued."""
        self._context.close()

    def _send(self, report: Report) -> None:
        if self._socket is not None:
            self._socket.send(msgspec.msgpack.encode(report), zmq.DONTWAIT)
