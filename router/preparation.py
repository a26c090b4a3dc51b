"""From a checked request body to the engine requests of its choices and the format of its response.

A request may be meant for several models, of which the router chooses one; so it is encoded as each of them sees it
first, and becomes a `Job` for the chosen one afterwards.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import msgspec

from ..cluster.errors import InvalidRequest, ModelNotFound
from ..cluster.latency_class import LatencyTargets
from ..cluster.request import EngineRequest, SamplingParams
from .generation import Choice
from .prompt_encoding import Encoded, ServedModel, encode_chat, encode_completion
from .prompt_features import PromptFacts
from .protocol import MAX_PROMPTS, ChatCompletionRequest, CompletionRequest, GenerationRequest
from .responses import ChatFormat, CompletionFormat, ResponseFormat, ResponseOptions
from .validation import choice_seeds, sampling_params

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions; chat may use the rest of the context."""
RequestT = TypeVar("RequestT", bound=GenerationRequest)


@dataclass
class Job:
    """A request that is ready to run."""

    model: str
    choices: list[Choice]
    format: ResponseFormat
    stream: bool


@dataclass(frozen=True)
class Context:
    """What a request brings besides its body."""

    latency: LatencyTargets
    cache_salt: str
    """Of the body and, if asked for, the API key."""
    scored: bool = False
    """Get the log-probabilities of the tokens, although the client may not want to see them."""


class Preparation(ABC, Generic[RequestT]):
    """One request on its way to a job. Making one checks what does not depend on the model; raises `InvalidRequest`."""

    def __init__(self, request: RequestT) -> None:
        self.request = request
        self._gives_ids = False
        """The prompt is token ids, which not every model with the same tokenizer need have."""

    async def encode(self, models: Iterable[ServedModel]) -> tuple[dict[str, Encoded], dict[str, str]]:
        """The request as each of `models` sees it, and why some of them cannot serve it.

        Models with the same tokenizer share one object. Raises `InvalidRequest` if none can serve it.
        """
        found: dict[tuple[str, int], Encoded] = {}
        encoded: dict[str, Encoded] = {}
        errors: dict[str, InvalidRequest] = {}
        for model in models:
            name = model.card.name
            key = (model.tokenizer.fingerprint, model.card.vocab_size if self._gives_ids else 0)
            try:
                if key not in found:
                    found[key] = await self._encode(model)
                self._sampling(model, max(map(len, found[key].prompts)))
            except InvalidRequest as error:
                errors[name] = error
            else:
                encoded[name] = found[key]
        if not encoded:
            raise next(iter(errors.values()))
        return encoded, {name: str(error) for name, error in errors.items()}

    @abstractmethod
    def facts(self, encoded: Encoded, latency_class: str) -> PromptFacts:
        """What rules and classifier look at."""

    @abstractmethod
    def job(self, model: ServedModel, encoded: Encoded, context: Context) -> Job:
        """The request as a job for `model`. Raises `InvalidRequest`: it cannot be served by this model."""

    @property
    @abstractmethod
    def max_tokens(self) -> int | None:
        """That the client allows; None: as many as the context holds."""

    @abstractmethod
    async def _encode(self, model: ServedModel) -> Encoded: ...

    @abstractmethod
    def _sampling(self, model: ServedModel, prompt_tokens: int) -> SamplingParams:
        """Of an answer to a prompt of so many tokens. Raises `InvalidRequest`: the model cannot serve it."""


class ChatPreparation(Preparation[ChatCompletionRequest]):
    """A chat completion."""

    def __init__(self, request: ChatCompletionRequest) -> None:
        super().__init__(request)
        if request.top_logprobs is not None and not request.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs = true", param="top_logprobs")
        if None not in (request.max_tokens, request.max_completion_tokens) and (
            request.max_tokens != request.max_completion_tokens
        ):
            raise InvalidRequest(
                f"max_tokens ({request.max_tokens}) and max_completion_tokens ({request.max_completion_tokens}) "
                "differ; give one of them",
                param="max_completion_tokens",
            )

    @property
    def max_tokens(self) -> int | None:
        request = self.request
        return request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens

    @property
    def _logprobs(self) -> int | None:
        return (self.request.top_logprobs or 0) if self.request.logprobs else None

    async def _encode(self, model: ServedModel) -> Encoded:
        return await encode_chat(self.request, model)

    def _sampling(self, model: ServedModel, prompt_tokens: int) -> SamplingParams:
        return sampling_params(self.request, model.card, prompt_tokens, self.max_tokens, self._logprobs)

    def facts(self, encoded: Encoded, latency_class: str) -> PromptFacts:
        messages = self.request.messages
        texts = [message.text for message in messages]
        asked = next((message.text for message in reversed(messages) if message.role == "user"), "")
        return PromptFacts(
            text=asked,
            chars=sum(map(len, texts)),
            messages=len(messages),
            prompt_tokens=len(encoded.prompts[0]),
            tools=any(message.role == "tool" or message.tool_calls for message in messages),
            latency_class=latency_class,
        )

    def job(self, model: ServedModel, encoded: Encoded, context: Context) -> Job:
        request = self.request
        options = _options("chatcmpl", request, model, encoded, self._logprobs)
        choices = _choices(request, model, options, partial(self._sampling, model), context)
        return Job(model.card.name, choices, ChatFormat(options, model.tokenizer), bool(request.stream))


class CompletionPreparation(Preparation[CompletionRequest]):
    """A completion of one or several prompts."""

    def __init__(self, request: CompletionRequest) -> None:
        super().__init__(request)
        n = request.n or 1
        if request.best_of not in (None, n):
            raise InvalidRequest(f"best_of = {request.best_of}: only n ({n}) is supported", param="best_of")
        if request.echo and request.logprobs is not None:
            raise InvalidRequest("echo with logprobs is not supported: prompts get no log-probabilities", param="echo")
        prompt = request.prompt
        self._gives_ids = not isinstance(prompt, str) and not isinstance(prompt[0], str)

    @property
    def max_tokens(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS if self.request.max_tokens is None else self.request.max_tokens

    async def _encode(self, model: ServedModel) -> Encoded:
        encoded, n = await encode_completion(self.request, model), self.request.n or 1
        if len(encoded.prompts) * n > MAX_PROMPTS:
            raise InvalidRequest(
                f"{len(encoded.prompts)} prompts × n = {n}: at most {MAX_PROMPTS} answers a request", param="n"
            )
        return encoded

    def _sampling(self, model: ServedModel, prompt_tokens: int) -> SamplingParams:
        request, limit = self.request, self.request.max_tokens
        if limit is None:
            limit = min(DEFAULT_COMPLETION_TOKENS, max(1, model.card.max_model_len - prompt_tokens))
        return sampling_params(request, model.card, prompt_tokens, limit, request.logprobs)

    def facts(self, encoded: Encoded, latency_class: str) -> PromptFacts:
        prompt = self.request.prompt
        first = prompt if isinstance(prompt, str) else prompt[0]
        text = first if isinstance(first, str) else ""
        return PromptFacts(
            text=text,
            chars=len(text),
            messages=1,
            prompt_tokens=len(encoded.prompts[0]),
            tools=False,
            latency_class=latency_class,
        )

    def job(self, model: ServedModel, encoded: Encoded, context: Context) -> Job:
        request = self.request
        options = _options("cmpl", request, model, encoded, request.logprobs)
        options.echoes = encoded.texts if request.echo else []
        choices = _choices(request, model, options, partial(self._sampling, model), context)
        return Job(model.card.name, choices, CompletionFormat(options, model.tokenizer), bool(request.stream))


def find_model(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    """The served model called `name`. Raises `ModelNotFound`."""
    return models[find_models(models, {}, name)[0]]


def find_models(models: Mapping[str, ServedModel], groups: Mapping[str, Sequence[str]], name: str) -> tuple[str, ...]:
    """The served models that may answer a request for `name`, a model or a group. Raises `ModelNotFound`."""
    if name in models:
        return (name,)
    if (members := groups.get(name)) is None:
        shown = name if len(name) <= 100 else name[:100] + "…"
        raise ModelNotFound(
            f"the model {shown!r} is not served here; served: {', '.join((*models, *groups))}", param="model"
        )
    return tuple(members)


def _options(
    prefix: str, request: GenerationRequest, model: ServedModel, encoded: Encoded, logprobs: int | None
) -> ResponseOptions:
    stream = request.stream_options
    if stream is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream = true", param="stream_options")
    return ResponseOptions(
        id=f"{prefix}-{secrets.token_hex(16)}",
        created=int(time.time()),
        model=model.card.name,
        logprobs=logprobs,
        return_token_ids=bool(request.return_token_ids),
        include_usage=bool(stream and stream.include_usage),
        continuous_usage=bool(stream and stream.continuous_usage_stats),
        prompts=encoded.prompts,
        n=request.n or 1,
    )


def _choices(
    request: GenerationRequest,
    model: ServedModel,
    options: ResponseOptions,
    sampling_of: Callable[[int], SamplingParams],
    context: Context,
) -> list[Choice]:
    """One engine request per prompt and choice; `sampling_of` a prompt with so many tokens."""
    seeds = choice_seeds(request.seed, options.n)
    choices: list[Choice] = []
    for prompt in options.prompts:
        sampling = sampling_of(len(prompt))
        if context.scored and sampling.logprobs is None:
            sampling = msgspec.structs.replace(sampling, logprobs=0)
        for seed in seeds:
            index = len(choices)
            engine_request = EngineRequest(
                request_id=f"{options.id}-{index}",
                prompt=prompt,
                sampling=msgspec.structs.replace(sampling, seed=seed),
                priority=request.priority or 0,
                cache_salt=context.cache_salt,
                latency=context.latency,
            )
            choices.append(
                Choice(
                    index,
                    engine_request,
                    model.tokenizer,
                    stop=request.stop or (),
                    user_stop_tokens=request.stop_token_ids or (),
                    include_stop=bool(request.include_stop_str_in_output),
                    skip_special_tokens=request.skip_special_tokens is not False,
                )
            )
    return choices
