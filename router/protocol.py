"""The request bodies of the OpenAI API, with vLLM's extensions, as strict pydantic models.

Every field that has an effect is declared here with its range. Two tables cover the rest of what clients send:
`IGNORED` fields never change an answer; `UNSUPPORTED` ones would, so they are refused by name unless their value asks
for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

MAX_CHOICES = 128
MAX_STOPS = 64
MAX_STOP_LENGTH = 1000
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 4096
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_TOOL_CALLS = 128
MAX_PRIORITY = 10

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "safety_identifier",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "prediction",
        "spaces_between_special_tokens",
    }
)
"""Accepted and without effect."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "suffix": ("",),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "logits_processors": ([],),
    "chat_template": (),
    "documents": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "mm_processor_kwargs": (),
    "return_tokens_as_token_ids": (False,),
    "kv_transfer_params": (),
}
"""Known fields that are not implemented, with the values (besides null) that ask for nothing."""


def _as_list(value: Any) -> Any:
    """A single text as a list of one."""
    return [value] if isinstance(value, str) else value


def _prompt_form(value: Any) -> str:
    """Which of its four forms a prompt has, by the type of its first element; errors then speak of that form only."""
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "<token ids of several>"
    return "<texts>" if isinstance(first, str) else "<token ids>"


def _content_form(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


_Prompts = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), BeforeValidator(_as_list)]
LogitBias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIASES)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], _Prompts, Tag("<texts>")]
    | Annotated[TokenIds, Field(min_length=1), Tag("<token ids>")]
    | Annotated[
        list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<token ids of several>")
    ],
    Discriminator(_prompt_form),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Strict):
    """What a stream carries besides the text."""

    include_usage: bool | None = None
    """A last chunk with the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Usage so far in every chunk."""
    include_obfuscation: bool | None = None
    """Without effect: streams are never padded."""


class TextPart(_Strict):
    """One part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message of a conversation. Fields without a value are left out of what the chat template sees."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: (
        Annotated[
            Annotated[str, Tag("<text>")]
            | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<parts>")],
            Discriminator(_content_form),
        ]
        | None
    ) = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    # Present in messages that clients send back as they got them; null unless another server made them.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        """All text of the message."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class GenerationRequest(_Strict):
    """Fields that both endpoints share. None always means the default."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 or −1: no limit."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopTexts | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    """Encode the prompt with the tokens that the model expects around a text; default: only for completions, because
    chat templates write them."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    """Lower is more urgent."""
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    """A latency class, see `router/latency_request.py`."""
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    """Requests of one session have it in common; the header `x-session-id` says the same."""
    return_token_ids: bool | None = None


class ChatCompletionRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
