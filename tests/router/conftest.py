"""A scripted engine behind the real HTTP application."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer as Backend

from raytroupe.cluster.errors import QueueFull, ReplicaUnavailable
from raytroupe.cluster.messages import ModelCard
from raytroupe.cluster.request import EngineRequest, FinishReason, TokenLogprobs, TokenOutput
from raytroupe.router.api import build_app

DEMO = Path(__file__).parents[2] / "deploy" / "demo_models" / "demo-large"
END = 6
"""`<|end|>`, the demo model's end of sequence."""


class ScriptedEngine:
    """Stands at the `EngineClient` boundary and keeps its contract: it "generates" a script's tokens.

    Like the engine it stops at stop tokens and at max_tokens, and reports log-probabilities if asked: the chosen
    token at `logprob` and the next lower ids at −1.5, −2.5 …
    """

    def __init__(self) -> None:
        self.backend = Backend.from_file(str(DEMO / "tokenizer.json"))
        self.script: Callable[[EngineRequest], list[int]] = lambda request: self.tokens("Paris is nice.")
        self.tokens_per_output = 1
        self.error: Exception | None = None
        """Raised instead of the token after the first `error_after`."""
        self.error_after = 0
        self.hold_after: int | None = None
        """Wait forever once so many tokens were given."""
        self.cached_tokens = 0
        self.texts: dict[str, str] = {}
        """Model → its answer, instead of the script's."""
        self.logprob = -0.25
        """Of every chosen token."""
        self.down: set[str] = set()
        """Models of which no replica can be reached."""
        self.full: set[str] = set()
        """Models whose queues are full."""
        self.asked: list[tuple[str, str | None, bool]] = []
        """Model, replica and patience of every request."""
        self.on_request: Callable[[str], None] = lambda model: None
        """Called with the model of every request."""
        self.stalled: list[str] = []
        self.requests: list[EngineRequest] = []
        self.running: set[str] = set()
        self.began: asyncio.Queue[str] = asyncio.Queue()
        self.idle = asyncio.Event()

    def tokens(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    async def generate(
        self, model: str, request: EngineRequest, replica: str | None = None, *, patient: bool = True
    ) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        self.asked.append((model, replica, patient))
        self.on_request(model)
        self.running.add(request.request_id)
        self.began.put_nowait(request.request_id)
        self.idle.clear()
        try:
            sampling = request.sampling
            text = self.texts.get(model)
            answer = self.script(request) if text is None else self.tokens(text)
            script = [*answer, *([END] * sampling.max_tokens)][: sampling.max_tokens]
            stops = [i for i, t in enumerate(script) if t in sampling.stop_token_ids and i >= sampling.min_tokens]
            script = script[: stops[0] + 1] if stops else script
            given = 0
            while given < len(script):
                if model in self.down:
                    raise ReplicaUnavailable(f"no replica of {model!r} is up")
                if model in self.full:
                    raise QueueFull(f"the queue of {model!r} is full", retry_after=3)
                if self.error is not None and given >= self.error_after:
                    raise self.error
                if given == self.hold_after:
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                tokens = script[given : given + self.tokens_per_output]
                given += len(tokens)
                last = given == len(script)
                yield TokenOutput(
                    request.request_id,
                    tokens,
                    (FinishReason.STOP if stops else FinishReason.LENGTH) if last else None,
                    tokens[-1] if last and stops else None,
                    None if sampling.logprobs is None else self._logprobs(tokens, sampling.logprobs),
                    self.cached_tokens,
                )
        finally:
            self.running.discard(request.request_id)
            if not self.running:
                self.idle.set()

    async def stalled_models(self) -> list[str]:
        return self.stalled

    def _logprobs(self, tokens: list[int], top: int) -> list[TokenLogprobs]:
        chosen = self.logprob
        others = [(-k, -0.5 - k) for k in range(1, top)]
        return [
            TokenLogprobs(chosen, [(token, chosen), *((token + k, value) for k, value in others)][:top])
            for token in tokens
        ]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def card() -> ModelCard:
    return ModelCard(name="demo", path=str(DEMO), max_model_len=256, vocab_size=1280, eos_token_ids=(END, 2), created=7)


@pytest.fixture
def app(engine: ScriptedEngine, card: ModelCard) -> FastAPI:
    return build_app([card], engine, max_body_bytes=1_000_000)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://troupe/v1/") as http:
        yield http


@pytest.fixture
async def address(app: FastAPI) -> AsyncIterator[str]:
    """`http://host:port` of a real server around the application."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.005)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = server.force_exit = True
    await serving
