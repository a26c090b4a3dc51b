"""The HTTP face: OpenAI's endpoints over an `EngineClient`, wherever that runs.

body ─ parse_request ─▶ prepare_* ─▶ Job ─ run_choices ─▶ deltas ─ ResponseFormat ─▶ JSON or server-sent events
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from .. import __version__
from ..cluster.messages import ModelCard
from .body_limit import BodyLimit
from .engine_client import EngineClient
from .error_response import ErrorBoundary, error_body, install_error_handlers, report
from .event_stream import ClientGone, EventStream, ServerSend, while_connected
from .generation import Choice, Delta, Updates, run_choices
from .metrics import IngressMetrics, RequestTimer
from .preparation import Job, ServedModel, find_model, prepare_chat, prepare_completion
from .protocol import ChatCompletionRequest, CompletionRequest
from .responses import STREAM_END, sse_event
from .validation import parse_request

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a request whose client went away; nobody receives it."""


def build_app(
    models: list[ModelCard],
    engine: EngineClient,
    *,
    max_body_bytes: int = 8 * 2**20,
    metrics: IngressMetrics | None = None,
    metrics_text: Callable[[], Awaitable[str]] | None = None,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """The ASGI application that serves `models` through `engine`.

    Args:
        models: what is served; the tokenizers are read from their folders now.
        engine: runs the requests.
        max_body_bytes: larger request bodies are refused with 413.
        metrics: where to record latencies.
        metrics_text: gives the text of `/metrics` in Prometheus' format.
        lifespan: what to do around the application's life, as FastAPI defines it.

    Raises:
        CheckpointError: a tokenizer cannot be read.
    """
    served = {card.name: ServedModel.load(card) for card in models}
    recorder = metrics or IngressMetrics()
    app = FastAPI(title="Troupe", version=__version__, lifespan=lifespan, openapi_url=None)
    install_error_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(ErrorBoundary)
    app.add_middleware(ServerSend)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await answer(http, await prepare_chat(parse_request(await http.body(), ChatCompletionRequest), served))

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await answer(http, await prepare_completion(parse_request(await http.body(), CompletionRequest), served))

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [_model_object(model.card) for model in served.values()]})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        return _json(_model_object(find_model(served, name).card))

    @app.get("/health")
    async def health() -> Response:
        stalled = await engine.stalled_models()
        return _json({"status": "stalled" if stalled else "ok", "stalled_models": stalled}, 503 if stalled else 200)

    @app.get("/metrics")
    async def prometheus() -> Response:
        text = await metrics_text() if metrics_text is not None else ""
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})

    async def answer(http: Request, job: Job) -> Response:
        headers = {"x-request-id": job.format.options.id}
        timer = RequestTimer(recorder, job.model, len(job.choices))
        updates = run_choices(job.choices, engine, job.model)
        try:
            if not job.stream:
                body = await while_connected(http, _collect(job, updates, timer))
                return Response(body, headers=headers, media_type="application/json")
            encoder = StreamEncoder(job, timer)
            try:  # until the first token a failure still has its own HTTP status
                first = encoder.event(await while_connected(http, anext(updates)))
            except BaseException:
                await updates.aclose()  # that token may have come in the moment in which the client left
                raise
            return EventStream(first, updates, encoder, headers)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    return app


async def _collect(job: Job, updates: Updates, timer: RequestTimer) -> bytes:
    """The whole response body."""
    parts: list[list[Delta]] = [[] for _ in job.choices]
    try:
        async for choice, delta in updates:
            timer.update(choice.index, len(delta.tokens), delta.finish_reason)
            parts[choice.index].append(delta)
    finally:
        await updates.aclose()
    return job.format.body(job.choices, [_joined(deltas) for deltas in parts])


def _joined(deltas: list[Delta]) -> Delta:
    return Delta(
        text="".join(delta.text for delta in deltas),
        tokens=[token for delta in deltas for token in delta.tokens],
        chances=[chance for delta in deltas for chance in delta.chances],
        finish_reason=deltas[-1].finish_reason,
    )


class StreamEncoder:
    """Writes the updates of one request as server-sent events, and takes their times."""

    def __init__(self, job: Job, timer: RequestTimer) -> None:
        self._choices = job.choices
        self._format = job.format
        self._timer = timer
        self._opened: set[int] = set()

    def event(self, update: tuple[Choice, Delta]) -> bytes:
        """The events for what a choice has gained; no bytes if that is nothing to tell yet."""
        choice, delta = update
        self._timer.update(choice.index, len(delta.tokens), delta.finish_reason)
        data = self._format.chunk(choice, delta, self._choices)
        if choice.index in self._opened:
            return data
        self._opened.add(choice.index)
        return self._format.opening(choice) + data

    def closing(self) -> bytes:
        """The events after the last update."""
        return self._format.closing(self._choices)

    def failure(self, error: Exception) -> bytes:
        """The events in place of what an error has prevented: it came too late for an HTTP status."""
        report(error)
        return sse_event(error_body(error)) + STREAM_END


def _json(data: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status, media_type="application/json")


def _model_object(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "troupe",
        "root": card.name,
        "parent": None,
        "max_model_len": card.max_model_len,
    }
