"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` with the matching HTTP status."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..cluster.errors import EngineError, QueueFull, RequestError

logger = logging.getLogger(__name__)


def error_body(error: Exception) -> dict[str, Any]:
    """The JSON object for `error`. Only a `RequestError`'s text is shown; anything else could leak internals."""
    if isinstance(error, RequestError):
        message, kind, param, code = error.message, error.type, error.param, error.code
    elif isinstance(error, EngineError):
        message, kind, param, code = "the engine failed while it served this request", "server_error", None, None
    else:
        message, kind, param, code = "internal server error", "server_error", None, None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> Response:
    """The HTTP response for `error`: its own status for a `RequestError`, 500 otherwise."""
    status = error.status if isinstance(error, RequestError) else 500
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, QueueFull) else None
    return Response(msgspec.json.encode(error_body(error)), status, headers, media_type="application/json")


def report(error: Exception) -> None:
    """Log `error` once if it is our fault; a client's mistake is not worth a line in the log."""
    if isinstance(error, EngineError):
        logger.error("%s", error)
    elif not isinstance(error, RequestError):
        logger.error("unexpected error while serving a request", exc_info=error)


def install_error_handlers(app: FastAPI) -> None:
    """Give every error that an endpoint or the routing raises OpenAI's form."""

    async def on_request_error(_: Request, error: Exception) -> Response:
        report(error)
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message, code = str(error.detail), None
        if error.status_code == 404:
            message, code = f"unknown path: {request.method} {request.url.path}", "unknown_url"
        elif error.status_code == 405:
            message, code = f"method {request.method} is not allowed for {request.url.path}", "method_not_allowed"
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
        headers = dict(error.headers) if error.headers else None
        return Response(msgspec.json.encode(body), error.status_code, headers, media_type="application/json")

    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(EngineError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_error)


class ErrorBoundary:
    """ASGI middleware: an unexpected exception becomes one logged traceback and a plain 500.

    Starlette's own outermost handler raises the exception again after answering, so that the server would log it a
    second time.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except ClientDisconnect:
            return  # gone while its body was read; nobody waits for an answer
        except Exception as error:
            report(error)
            if started:
                raise  # the response is half sent; the server has to drop the connection
            await error_response(error)(scope, receive, send)
