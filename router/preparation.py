"""From a checked request body to the engine requests of its choices and the format of its response."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..cluster.errors import InvalidRequest, ModelNotFound
from ..cluster.messages import ModelCard
from ..cluster.request import EngineRequest
from .detokenizer import Detokenizer
from .generation import Choice
from .protocol import MAX_PROMPTS, ChatCompletionRequest, ChatMessage, CompletionRequest, GenerationRequest
from .responses import ChatFormat, CompletionFormat, ResponseFormat, ResponseOptions
from .tokenizer import Tokenizer
from .validation import check_tokens, choice_seeds, sampling_params

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions; chat may use the rest of the context."""

_INLINE_TEMPLATE_BYTES = 16_384
"""Conversations that are larger as JSON are rendered in a thread, so that other requests go on meanwhile."""
_TEMPLATE_ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class ServedModel:
    """A model as the ingress knows it."""

    card: ModelCard
    tokenizer: Tokenizer

    @classmethod
    def load(cls, card: ModelCard) -> ServedModel:
        """Read the tokenizer from the model's folder. Raises `CheckpointError`."""
        return cls(card, Tokenizer.load(Path(card.path)))


@dataclass
class Job:
    """A request that is ready to run."""

    model: str
    choices: list[Choice]
    format: ResponseFormat
    stream: bool


def find_model(models: dict[str, ServedModel], name: str) -> ServedModel:
    """The served model called `name`. Raises `ModelNotFound`."""
    if (model := models.get(name)) is None:
        shown = name if len(name) <= 100 else name[:100] + "…"
        raise ModelNotFound(f"the model {shown!r} is not served here; served: {', '.join(models)}", param="model")
    return model


async def prepare_chat(request: ChatCompletionRequest, models: dict[str, ServedModel]) -> Job:
    """Render and encode the messages of a chat completion.

    Raises:
        InvalidRequest: a parameter or the messages cannot be served.
        ModelNotFound: no such model.
    """
    model = find_model(models, request.model)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs = true", param="top_logprobs")
    if None not in (request.max_tokens, request.max_completion_tokens) and (
        request.max_tokens != request.max_completion_tokens
    ):
        raise InvalidRequest(
            f"max_tokens ({request.max_tokens}) and max_completion_tokens ({request.max_completion_tokens}) differ; "
            "give one of them",
            param="max_completion_tokens",
        )
    text = await _render(request, model)
    prompt = await model.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))
    if not prompt:
        raise InvalidRequest("messages: the chat template made an empty prompt of them", param="messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    options = _options("chatcmpl", request, [prompt], logprobs)
    choices = _choices(request, model, options, max_tokens)
    return Job(request.model, choices, ChatFormat(options, model.tokenizer), bool(request.stream))


async def prepare_completion(request: CompletionRequest, models: dict[str, ServedModel]) -> Job:
    """Encode the prompt or prompts of a completion.

    Raises:
        InvalidRequest: a parameter or a prompt cannot be served.
        ModelNotFound: no such model.
    """
    model = find_model(models, request.model)
    n = request.n or 1
    if request.best_of not in (None, n):
        raise InvalidRequest(f"best_of = {request.best_of}: only n ({n}) is supported", param="best_of")
    if request.echo and request.logprobs is not None:
        raise InvalidRequest("echo with logprobs is not supported: prompts get no log-probabilities", param="echo")
    prompts, texts = await _encode_prompts(request, model)
    if len(prompts) * n > MAX_PROMPTS:
        raise InvalidRequest(f"{len(prompts)} prompts × n = {n}: at most {MAX_PROMPTS} answers a request", param="n")
    options = _options("cmpl", request, prompts, request.logprobs)
    options.echoes = texts if request.echo else []
    choices = _choices(request, model, options, request.max_tokens, default_max_tokens=DEFAULT_COMPLETION_TOKENS)
    return Job(request.model, choices, CompletionFormat(options, model.tokenizer), bool(request.stream))


async def _render(request: ChatCompletionRequest, model: ServedModel) -> str:
    """The prompt text of a conversation."""
    template = model.tokenizer.chat_template
    if template is None:
        raise InvalidRequest(
            f"the model {model.card.name!r} has no chat template; use /v1/completions", param="messages"
        )
    variables = request.chat_template_kwargs or {}
    if taken := [name for name in _TEMPLATE_ARGUMENTS if name in variables]:
        raise InvalidRequest(f"chat_template_kwargs must not set {taken[0]}", param="chat_template_kwargs")
    continue_final = bool(request.continue_final_message)
    if continue_final and request.add_generation_prompt:
        raise InvalidRequest(
            "add_generation_prompt and continue_final_message exclude each other", param="continue_final_message"
        )
    messages = [_template_message(index, message) for index, message in enumerate(request.messages)]
    add_header = not continue_final if request.add_generation_prompt is None else request.add_generation_prompt

    def render() -> str:
        return template.render(
            messages,
            add_generation_prompt=add_header,
            continue_final_message=continue_final,
            variables=variables,
        )

    if len(msgspec.json.encode((messages, variables))) <= _INLINE_TEMPLATE_BYTES:
        return render()
    return await asyncio.to_thread(render)


def _template_message(index: int, message: ChatMessage) -> dict[str, Any]:
    """What the chat template sees of a message: text parts joined, fields without a value left out."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    if content is None and message.role != "assistant":
        raise InvalidRequest(f"messages[{index}].content: required and not given", param="messages")
    fields = {
        "role": message.role,
        "content": content,
        "name": message.name,
        "tool_calls": message.tool_calls,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content or message.reasoning,
    }
    return {name: value for name, value in fields.items() if value is not None}


async def _encode_prompts(request: CompletionRequest, model: ServedModel) -> tuple[list[list[int]], list[str]]:
    """Token ids of every prompt, and their texts if these are to be echoed."""
    given = request.prompt
    several: Sequence[str | list[int]] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    markers = request.add_special_tokens is not False
    prompts, texts = [], []
    for prompt in several:
        if isinstance(prompt, str):
            tokens = await model.tokenizer.encode(prompt, add_special_tokens=markers) if prompt else []
            texts.append(prompt)
        else:
            tokens = prompt
            check_tokens(tokens, model.card, "prompt")
            texts.append(_decode(tokens, model.tokenizer) if request.echo else "")
        if not tokens:
            raise InvalidRequest("prompt: must not be empty", param="prompt")
        prompts.append(tokens)
    return prompts, texts


def _decode(tokens: list[int], tokenizer: Tokenizer) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, tokens))


def _options(
    prefix: str, request: GenerationRequest, prompts: list[list[int]], logprobs: int | None
) -> ResponseOptions:
    stream = request.stream_options
    if stream is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream = true", param="stream_options")
    return ResponseOptions(
        id=f"{prefix}-{secrets.token_hex(16)}",
        created=int(time.time()),
        model=request.model,
        logprobs=logprobs,
        return_token_ids=bool(request.return_token_ids),
        include_usage=bool(stream and stream.include_usage),
        continuous_usage=bool(stream and stream.continuous_usage_stats),
        prompts=prompts,
        n=request.n or 1,
    )


def _choices(
    request: GenerationRequest,
    model: ServedModel,
    options: ResponseOptions,
    max_tokens: int | None,
    *,
    default_max_tokens: int | None = None,
) -> list[Choice]:
    """One engine request per prompt and choice."""
    seeds = choice_seeds(request.seed, options.n)
    choices: list[Choice] = []
    for prompt in options.prompts:
        limit = max_tokens
        if limit is None and default_max_tokens is not None:
            limit = min(default_max_tokens, max(1, model.card.max_model_len - len(prompt)))
        sampling = sampling_params(request, model.card, len(prompt), limit, options.logprobs)
        for seed in seeds:
            index = len(choices)
            engine_request = EngineRequest(
                request_id=f"{options.id}-{index}",
                prompt=prompt,
                sampling=msgspec.structs.replace(sampling, seed=seed),
                priority=request.priority or 0,
                cache_salt=request.cache_salt or "",
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
