"""From messages or prompts to token ids, as one model sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..cluster.errors import InvalidRequest
from ..cluster.messages import ModelCard
from .detokenizer import Detokenizer
from .protocol import ChatCompletionRequest, ChatMessage, CompletionRequest
from .tokenizer import Tokenizer
from .validation import check_tokens

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


@dataclass(frozen=True)
class Encoded:
    """The prompts of a request as one model sees them."""

    prompts: list[list[int]]
    """Token ids."""
    texts: list[str]
    """Of a completion that echoes them."""


async def encode_chat(request: ChatCompletionRequest, model: ServedModel) -> Encoded:
    """Render and encode the messages of a chat completion. Raises `InvalidRequest`."""
    text = await _render(request, model)
    prompt = await model.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))
    if not prompt:
        raise InvalidRequest("messages: the chat template made an empty prompt of them", param="messages")
    return Encoded([prompt], [])


async def encode_completion(request: CompletionRequest, model: ServedModel) -> Encoded:
    """Encode the prompt or prompts of a completion. Raises `InvalidRequest`."""
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
    return Encoded(prompts, texts)


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
    content = message.content if message.content is None else message.text
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


def _decode(tokens: list[int], tokenizer: Tokenizer) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, tokens))
