"""Answering while watching the connection: a client that goes away stops the work for it at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

Result = TypeVar("Result")
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


async def until_disconnect(receive: Receive) -> None:
    """Wait for the client to go away. The request body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled if the client goes away first.

    Raises:
        ClientGone: it did.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_disconnect(request.receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        await _stop(gone)
        await _stop(working)


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
        sending = asyncio.ensure_future(self._send_all(send, scope.get(SERVER_SEND, send)))
        gone = asyncio.ensure_future(until_disconnect(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with contextlib.suppress(OSError):  # raised by servers for a broken connection
                    sending.result()
        finally:
            await _stop(gone)
            await _stop(sending)
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


async def _stop(task: asyncio.Future[Any]) -> None:
    """Cancel `task` and wait until it has cleaned up."""
    if not task.done():
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
