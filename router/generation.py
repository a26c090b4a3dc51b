"""One request on its way through the ingress: its choices, and the text and bookkeeping of each as tokens arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import msgspec

from ..cluster.errors import EngineError
from ..cluster.request import EngineRequest, TokenLogprobs, TokenOutput
from .detokenizer import Detokenizer, StopStrings
from .engine_client import EngineClient
from .tokenizer import Tokenizer


@dataclass
class TokenChance:
    """A generated token with its log-probabilities and where it stands in the answer's text."""

    token: int
    logprobs: TokenLogprobs
    text_offset: int
    """Characters of the answer before this token."""


class Delta(msgspec.Struct):
    """What one engine output adds to a choice. A struct, because one is made for every token."""

    text: str = ""
    tokens: list[int] = []
    chances: list[TokenChance] = []
    """One per token if the request asks for log-probabilities."""
    finish_reason: str | None = None


class Choice:
    """One of the answers to a request: an engine request and the text that comes of it."""

    def __init__(
        self,
        index: int,
        request: EngineRequest,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        user_stop_tokens: Sequence[int] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """Begin an answer.

        Args:
            index: its place among the choices of the response.
            request: what the engine is asked for.
            tokenizer: of the model.
            stop: stop strings.
            user_stop_tokens: stop tokens that the client named; they are reported as `stop_reason`.
            include_stop: leave the stop string or stop token in the text.
            skip_special_tokens: leave special tokens out of the text.
        """
        self.index = index
        self.request = request
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        """The stop string or the client's stop token that ended the answer."""
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.replica: str | None = None
        """The replica that was chosen for it beforehand; None: the engine client chooses."""
        self.patient = True
        """Wait for a replica to come up if none is; False: another model would answer instead."""
        self._min_tokens = request.sampling.min_tokens
        self._user_stop_tokens = frozenset(user_stop_tokens)
        self._include_stop = include_stop
        self._detokenizer = Detokenizer(tokenizer, request.prompt, skip_special_tokens=skip_special_tokens)
        self._stops = StopStrings(stop, include=include_stop)
        self._characters = 0
        self._text_only = not stop and request.sampling.logprobs is None

    def feed(self, output: TokenOutput) -> Delta:
        """Take in what an engine step produced. Tokens after a stop string are dropped."""
        if self._text_only and output.finish_reason is None:  # as most are: one token with nothing to look for in it
            self.completion_tokens += len(output.tokens)
            self.cached_tokens = self.cached_tokens or output.cached_tokens
            push, tokens = self._detokenizer.push, output.tokens
            return Delta(push(tokens[0]) if len(tokens) == 1 else "".join(map(push, tokens)), tokens)
        delta = Delta()
        pieces = []
        self.cached_tokens = self.cached_tokens or output.cached_tokens
        for position, token in enumerate(output.tokens):
            self.completion_tokens += 1
            delta.tokens.append(token)
            if output.logprobs is not None:
                delta.chances.append(TokenChance(token, output.logprobs[position], self._characters))
            ends_here = output.stop_token is not None and position == len(output.tokens) - 1
            text = "" if ends_here and not self._include_stop else self._detokenizer.push(token)
            self._characters += len(text)
            # Like stop tokens, stop strings do not count before the minimum is reached.
            pieces.append(self._stops.push(text) if self.completion_tokens > self._min_tokens else text)
            if self._stops.found is not None:
                self.finish_reason, self.stop_reason = "stop", self._stops.found
                break
        if self.finish_reason is None and output.finish_reason is not None:
            self.finish_reason = output.finish_reason.value
            if output.stop_token in self._user_stop_tokens:
                self.stop_reason = output.stop_token
            pieces.append(self._stops.flush())
        delta.text = "".join(pieces)
        delta.finish_reason = self.finish_reason
        return delta


class ChoiceStream:
    """What one choice gains, as it comes: an async iterator of (choice, delta) up to its finish reason.

    Every streamed token passes here, so this is a class and not an async generator, which costs more per item.
    """

    def __init__(self, choice: Choice, engine: EngineClient, model: str) -> None:
        """Generate `choice` on `model` as soon as the first delta is asked for."""
        self._choice = choice
        self._outputs = engine.generate(model, choice.request, choice.replica, patient=choice.patient)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Choice, Delta]:
        choice = self._choice
        try:
            if choice.finish_reason is not None:
                raise StopAsyncIteration
            try:
                output = await self._outputs.__anext__()
            except StopAsyncIteration:
                raise EngineError(f"request {choice.request.request_id} ended without a finish reason") from None
            return choice, choice.feed(output)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Stop; the engine request is aborted unless it has ended."""
        await self._outputs.aclose()


class Updates(Protocol):
    """What the choices of a request gain, as it comes: an async iterator of (choice, delta)."""

    def __aiter__(self) -> AsyncIterator[tuple[Choice, Delta]]: ...

    async def __anext__(self) -> tuple[Choice, Delta]: ...

    async def aclose(self) -> None:
        """Stop; what has not ended is aborted."""


def run_choices(choices: Sequence[Choice], engine: EngineClient, model: str) -> Updates:
    """Generate all `choices` at once and give what each gains, as it comes. Closing the stream aborts them all.

    The engine's outputs wait in its client until they are asked for, so a slow reader gets fewer, larger deltas.
    """
    if len(choices) == 1:
        return ChoiceStream(choices[0], engine, model)
    return _merged([ChoiceStream(choice, engine, model) for choice in choices])


async def _merged(streams: Sequence[ChoiceStream]) -> AsyncGenerator[tuple[Choice, Delta], None]:
    """The updates of several choices, each read in a task of its own."""
    arrived: asyncio.Queue[tuple[Choice, Delta] | Exception] = asyncio.Queue(maxsize=1)

    async def pump(stream: ChoiceStream) -> None:
        try:
            async for update in stream:
                await arrived.put(update)
        except Exception as error:  # the reader raises it; nothing may be lost in a task
            await arrived.put(error)
        finally:
            await stream.aclose()

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(streams)
        while running:
            update = await arrived.get()
            if isinstance(update, Exception):
                raise update
            running -= update[1].finish_reason is not None
            yield update
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
