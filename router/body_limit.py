"""Refuses request bodies over a limit while they arrive, without holding more than the limit in memory."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..cluster.errors import PayloadTooLarge


class BodyLimit:
    """ASGI middleware: reading a body of more than `max_bytes` raises `PayloadTooLarge` in the endpoint.

    A declared `Content-Length` over the limit is refused before a byte is read; a body without one (chunked) is
    counted as it comes.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        # More digits than any machine has bytes: not worth (or, beyond 4300 digits, not safe) to convert.
        oversized = declared.isdigit() and (len(declared) > 18 or int(declared) > self.max_bytes)
        read = 0

        async def counted_receive() -> Message:
            nonlocal read
            if oversized:
                raise self._refusal(f"{declared[:18].decode()} bytes")
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self.max_bytes:
                    raise self._refusal(f"more than {self.max_bytes} bytes")
            return message

        await self.app(scope, counted_receive, send)

    def _refusal(self, size: str) -> PayloadTooLarge:
        return PayloadTooLarge(f"the request body has {size}; at most {self.max_bytes} are accepted")
