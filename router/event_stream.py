"""Answering while watching the connection: a client that goes away stops the work for it at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from fastapi import Response
from starlette.types import ASGIApp, Receive, Scope, Send

Update = TypeVar("Update")
Update_co = TypeVar("Update_co", covariant=True)
Update_contra = TypeVar("Update_contra", contravariant=True)

SERVER_SEND = "troupe.server_send"
"""Key in the ASGI scope: `send` as the application got it, before its own layers were put around it."""


class ServerSend:
    """ASGI middleware that lets an `EventStream` talk to the server directly.

    The layers of Starlette and FastAPI between an endpoint and the server look at the beginning of a response only;
    for its body they just pass each message on, which costs one coroutine per layer and token.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note `send` in the scope and go on."""
        scope[SERVER_SEND] = send
        await self.app(scope, receive, send)


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class WhileConnected:
    """Cancels what runs inside of it when the client goes away, and raises `ClientGone` in place of the cancellation.

    The work stays in the request's own task. Another task for it, or waiting for the end of one, takes several turns
    of the event loop, which in a busy ingress are tens of milliseconds each, all in the time to the first token.
    """

    def __init__(self, receive: Receive) -> None:
        """`receive` is that of the request, whose body must have been read."""
        self._receive = receive
        self._gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "requests are served in tasks"
        self._task, self._cancellations = task, task.cancelling()
        self._watching = asyncio.ensure_future(self._watch())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._watching.cancel()  # not waited for: nothing depends on its end
        if not self._gone:
            return
        cancelled = kind is None or issubclass(kind, asyncio.CancelledError)
        if self._task.uncancel() <= self._cancellations and cancelled:  # else somebody else has cancelled it, too
            raise ClientGone from error

    async def _watch(self) -> None:
        with contextlib.suppress(Exception):  # whatever it is, the connection is of no use any more
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self._gone = True
        self._task.cancel()


class Source(Protocol[Update_co]):
    """An async iterator of updates that can be closed before its end."""

    async def __anext__(self) -> Update_co: ...

    async def aclose(self) -> None: ...


class Encoder(Protocol[Update_contra]):
    """Writes updates as server-sent events. Nothing is sent where it returns no bytes."""

    def event(self, update: Update_contra) -> bytes: ...

    def closing(self) -> bytes: ...

    def failure(self, error: Exception) -> bytes: ...


class EventStream(Response, Generic[Update]):
    """Server-sent events, which end as soon as the client goes away."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first_event: bytes,
        rest: Source[Update],
        encoder: Encoder[Update],
        headers: dict[str, str] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """Send `first_event` and the events of `rest`; at the end, in any case, close `rest` and call `on_end`.

        An exception that `rest` or `encoder` raises becomes the last event.
        """
        # Proxies must neither keep nor gather the events.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._first_event = first_event
        self._rest = rest
        self._encoder = encoder
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; returns early without an error when the client is gone."""
        try:
            # Servers raise OSError for a broken connection.
            with contextlib.suppress(ClientGone, OSError):
                async with WhileConnected(receive):
                    await self._send_all(send, scope.get(SERVER_SEND, send))
        finally:
            await self._rest.aclose()
            if self._on_end is not None:
                self._on_end()

    async def _send_all(self, send_start: Send, send: Send) -> None:
        """Every token of every stream passes this loop: one task, and no layer that is not needed."""
        await send_start({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        encode, following = self._encoder.event, self._rest.__anext__
        data = self._first_event
        while True:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            try:
                data = encode(await following())
            except StopAsyncIteration:
                data = self._encoder.closing()
                break
            except Exception as error:
                data = self._encoder.failure(error)
                break
        await send({"type": "http.response.body", "body": data, "more_body": False})
