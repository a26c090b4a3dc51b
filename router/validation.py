"""From the bytes of a request body to checked values, with errors that name the parameter and what is allowed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

import annotated_types
import msgspec
from pydantic import BaseModel, ValidationError

from ..cluster.errors import InvalidRequest
from ..cluster.messages import ModelCard
from ..cluster.request import SamplingParams
from .protocol import IGNORED, UNSUPPORTED, GenerationRequest

RequestModel = TypeVar("RequestModel", bound=GenerationRequest)

_SHOWN_CHARACTERS = 80
"""Longer values are cut in messages."""
_U64 = 2**64


def parse_body(body: bytes) -> dict[str, Any]:
    """The fields of a request body.

    JSON is read strictly: no NaN or Infinity, no unpaired surrogates, no nesting beyond what a parser can take.

    Raises:
        InvalidRequest: it is no JSON object.
    """
    try:
        data = msgspec.json.decode(body)
    except RecursionError:
        raise InvalidRequest("the request body is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        # Unpaired surrogates end here too: text has to be valid Unicode.
        raise InvalidRequest(f"the request body is not valid JSON in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"the request body must be a JSON object, not {_shown(data)}")
    return data


def parse_fields(data: dict[str, Any], model: type[RequestModel]) -> RequestModel:
    """Check the fields of a request. Raises `InvalidRequest`, which names the first parameter that is wrong."""
    try:
        return model.model_validate(_without_idle_fields(data, model))
    except ValidationError as error:
        raise _explain(error, model) from None
    except RecursionError:
        raise InvalidRequest("the request body is nested too deeply") from None


def sampling_params(
    request: GenerationRequest, card: ModelCard, prompt_tokens: int, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """The engine's sampling parameters for one prompt of `request`, without a seed.

    Args:
        request: a checked body.
        card: the model, whose defaults fill what the request leaves open.
        prompt_tokens: length of the prompt.
        max_tokens: what the request asks for; None: the rest of the context.
        logprobs: alternatives to report per token; None: no log-probabilities.

    Raises:
        InvalidRequest: lengths that exceed the context, or tokens that the model does not have.
    """
    room = card.max_model_len - prompt_tokens
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens, but the context of {card.name!r} holds {card.max_model_len} and "
            "needs room for at least one more; shorten the prompt",
            param="messages" if hasattr(request, "messages") else "prompt",
        )
    max_tokens = room if max_tokens is None else max_tokens
    if max_tokens > room:
        param = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
        raise InvalidRequest(
            f"{param} = {_shown(max_tokens)}: with the prompt of {prompt_tokens} tokens it exceeds the context of "
            f"{card.max_model_len}; at most {room} are possible",
            param=param,
        )
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens = {_shown(min_tokens)}: must be at most max_tokens ({max_tokens})", param="min_tokens"
        )
    check_tokens(request.stop_token_ids or (), card, "stop_token_ids")

    def choose(name: str, fallback: float) -> float:
        value = getattr(request, name)
        return card.default_sampling.get(name, fallback) if value is None else value

    stop_tokens = [*(request.stop_token_ids or ()), *(() if request.ignore_eos else card.eos_token_ids)]
    return SamplingParams(
        temperature=choose("temperature", 1.0),
        top_p=choose("top_p", 1.0),
        top_k=max(0, int(choose("top_k", 0))),
        min_p=choose("min_p", 0.0),
        repetition_penalty=choose("repetition_penalty", 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias or {}, card),
        logprobs=logprobs,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=tuple(dict.fromkeys(stop_tokens)),
    )


def choice_seeds(seed: int | None, n: int) -> list[int]:
    """Seeds of `n` choices: the request's own (or a random one) first, then numbers that are spread from it.

    The spread is splitmix64 (Steele, Lea and Flood 2014), which maps different inputs to different outputs.
    """
    seed = random.getrandbits(64) if seed is None else seed % _U64
    return [seed, *(_splitmix64(seed, index) for index in range(1, n))]


def check_tokens(tokens: Sequence[int], card: ModelCard, param: str) -> None:
    """Refuse token ids that the model does not have."""
    if tokens and (largest := max(tokens)) >= card.vocab_size:
        raise InvalidRequest(
            f"{param}: token id {_shown(largest)} does not exist; {card.name!r} has ids 0 to {card.vocab_size - 1}",
            param=param,
        )


def _splitmix64(seed: int, index: int) -> int:
    value = (seed + index * 0x9E3779B97F4A7C15) % _U64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % _U64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % _U64
    return value ^ (value >> 31)


def _logit_bias(bias: dict[str, float], card: ModelCard) -> dict[int, float]:
    """Keys as token ids; their values were checked with the body."""
    found = {}
    for key, value in bias.items():
        # 19 digits are beyond any vocabulary and keep int() from being asked for millions.
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 20 else -1
        if not 0 <= token < card.vocab_size:
            raise InvalidRequest(
                f"logit_bias: {_shown(key)} is not a token id; {card.name!r} has ids 0 to {card.vocab_size - 1}",
                param="logit_bias",
            )
        found[token] = float(value)
    return found


def _without_idle_fields(data: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """`data` without fields that change nothing; raises for the ones that would and are not implemented."""
    kept = {}
    for name, value in data.items():
        if name in model.model_fields:
            kept[name] = value
        elif name in UNSUPPORTED:
            if value is not None and value not in UNSUPPORTED[name]:
                raise InvalidRequest(f"{name} is not supported here; leave it out", param=name)
        elif name not in IGNORED:
            kept[name] = value  # the model refuses it
    return kept


def _explain(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """The first fault of `error` in words."""
    fault = error.errors(include_url=False, include_context=False)[0]
    # Names in angle brackets are the forms of a union, not fields.
    location = [part for part in fault["loc"] if not str(part).startswith("<")]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    param = str(location[0]) if location else None
    if fault["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown parameter: {_shown(path)[1:-1]}", param=path[:_SHOWN_CHARACTERS])
    if fault["type"] == "missing":
        return InvalidRequest(f"{path}: required and not given", param=path)
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if len(location) == 1 and (bounds := _bounds(model.model_fields[str(location[0])].annotation)):
        message = f"must be {bounds}" if "than" in fault["type"] else f"{message}, {bounds}"
    if isinstance(fault["input"], dict | list) and fault["type"].startswith("too_"):
        return InvalidRequest(f"{path}: {message}", param=param)
    return InvalidRequest(f"{path} = {_shown(fault['input'])}: {message}", param=param)


def _bounds(annotation: Any) -> str:
    """The numeric range written in a field's annotation, for example `>= 0 and <= 2`."""
    parts = []
    if get_origin(annotation) is Annotated:
        for note in get_args(annotation)[1:]:
            for bound in getattr(note, "metadata", (note,)):
                for kind, sign, name in _BOUND_SIGNS:
                    if isinstance(bound, kind):
                        parts.append(f"{sign} {getattr(bound, name)}")
        return " and ".join(parts)
    if get_origin(annotation) in (list, dict):
        return ""  # bounds of the elements
    return next(filter(None, map(_bounds, get_args(annotation))), "")


_BOUND_SIGNS: tuple[tuple[Any, str, str], ...] = (
    (annotated_types.Ge, ">=", "ge"),
    (annotated_types.Gt, ">", "gt"),
    (annotated_types.Le, "<=", "le"),
    (annotated_types.Lt, "<", "lt"),
)


def _shown(value: object) -> str:
    """`repr` of a value from outside, cut to a length that fits a message."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 77 digits"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value[: _SHOWN_CHARACTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
