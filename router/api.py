"""The HTTP face: OpenAI's endpoints over an `EngineClient`, wherever that runs.

body ─▶ Preparation ─ Router ─▶ Job ─ run_choices ─▶ deltas ─ ResponseFormat ─▶ JSON or server-sent events
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from .. import __version__
from ..cluster.messages import ModelCard
from .answering import Answering
from .body_limit import BodyLimit
from .engine_client import EngineClient
from .error_response import ErrorBoundary, install_error_handlers
from .event_stream import ServerSend
from .metrics import IngressMetrics
from .preparation import ChatPreparation, CompletionPreparation, Preparation, find_model
from .prompt_encoding import ServedModel
from .protocol import ChatCompletionRequest, CompletionRequest
from .router import Router
from .validation import parse_body, parse_fields


def build_app(
    models: list[ModelCard],
    engine: EngineClient,
    router: Router | None = None,
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
        router: chooses models and replicas; without one, models answer to their own names and any replica may.
        max_body_bytes: larger request bodies are refused with 413.
        metrics: where to record latencies.
        metrics_text: gives the text of `/metrics` in Prometheus' format.
        lifespan: what to do around the application's life, as FastAPI defines it.

    Raises:
        CheckpointError: a tokenizer cannot be read.
    """
    served = {card.name: ServedModel.load(card) for card in models}
    router = router or Router(models)
    answering = Answering(served, router, engine, metrics or IngressMetrics())
    app = FastAPI(title="Troupe", version=__version__, lifespan=lifespan, openapi_url=None)
    install_error_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(ErrorBoundary)
    app.add_middleware(ServerSend)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await answering.answer(http, _chat(parse_body(await http.body())))

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await answering.answer(http, _completion(parse_body(await http.body())))

    @app.post("/v1/route")
    async def route(http: Request) -> Response:
        fields = parse_body(await http.body())
        return _json(await answering.explain(http, (_chat if "messages" in fields else _completion)(fields)))

    @app.get("/v1/models")
    async def list_models() -> Response:
        groups = router.groups if len(served) > 1 else {}
        found = [_model_object(model.card) for model in served.values()]
        found += [_group_object(name, members) for name, members in groups.items()]
        return _json({"object": "list", "data": found})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        if name not in served and name in router.groups:
            return _json(_group_object(name, router.groups[name]))
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

    return app


def _chat(fields: dict[str, Any]) -> Preparation[Any]:
    return ChatPreparation(parse_fields(fields, ChatCompletionRequest))


def _completion(fields: dict[str, Any]) -> Preparation[Any]:
    return CompletionPreparation(parse_fields(fields, CompletionRequest))


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
        "price_per_hour": card.price_per_hour,
        "accuracy": card.accuracy,
        "task_accuracy": card.task_accuracy,
    }


def _group_object(name: str, members: Sequence[str]) -> dict[str, Any]:
    """A name that stands for several models, as a model of its own: clients choose from this list."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "troupe", "root": name, "members": [*members]}
