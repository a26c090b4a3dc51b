"""Events that are put together from prepared bytes are those that the whole JSON object would give, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytroupe.cluster.request import EngineRequest, SamplingParams, TokenOutput
from raytroupe.router.generation import Choice, Delta
from raytroupe.router.responses import ChatFormat, CompletionFormat, ResponseFormat, ResponseOptions, sse_event
from raytroupe.router.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "deploy" / "demo_models" / "demo-large")
CONTROLS = ["\n", "\r\n", "\t", "\0", "\x1b", "\x7f", "\u2028"]
ODD = [*CONTROLS, '"', "\\", '\\"', "é", "🦜", "👩\u200d👧", "\ufffd", "data: [DONE]\n\n", "</s>"]
TEXTS = st.lists(st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]))).map("".join)
OPTIONS = [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage": True}, {"logprobs": 0}]
END = 6
"""A special token of the demo model."""


def choice(index: int = 0, prompt: list[int] | None = None, stop: tuple[str, ...] = ()) -> Choice:
    request = EngineRequest(request_id="r", prompt=prompt or [9, 300], sampling=SamplingParams(max_tokens=1000))
    return Choice(index, request, TOKENIZER, stop=stop)


def response_format(kind: type[ResponseFormat], options: dict[str, Any]) -> ResponseFormat:
    return kind(ResponseOptions(id='i"d', created=7, model='a "model"\\', prompts=[[9, 300]], **options), TOKENIZER)


def schema(kind: type[ResponseFormat], index: int, text: str, options: dict[str, Any]) -> dict[str, Any]:
    """A chunk as OpenAI's API reference has it, keys in the order of ours."""
    gained = {"delta": {"content": text}} if kind is ChatFormat else {"text": text}
    chunk = {
        "id": 'i"d',
        "object": "chat.completion.chunk" if kind is ChatFormat else "text_completion",
        "created": 7,
        "model": 'a "model"\\',
        "system_fingerprint": None,
        "choices": [{"index": index, **gained, "logprobs": None, "finish_reason": None}],
    }
    if options.get("continuous_usage"):
        usage = {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}
        return chunk | {"usage": usage | {"prompt_tokens_details": {"cached_tokens": 0}}}
    return chunk | {"usage": None} if options.get("include_usage") else chunk


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("kind", [ChatFormat, CompletionFormat])
@given(texts=st.lists(TEXTS.filter(bool), min_size=1), index=st.integers(0, 3))
def test_an_event_is_the_encoded_schema(kind, options, texts, index) -> None:
    ours, one = response_format(kind, options), choice(index)
    for text in texts:
        event = ours.chunk(one, Delta(text, [300]), [one])
        assert event == sse_event(schema(kind, index, text, options))
        assert event.startswith(b"data: ")
        assert event.endswith(b"}\n\n")
        assert event.count(b"\n") == 2, "a line break in the text would end the event"


@pytest.mark.parametrize("kind", [ChatFormat, CompletionFormat])
def test_no_text_is_no_event(kind) -> None:
    ours, one = response_format(kind, {}), choice()
    assert ours.chunk(one, Delta("", [300]), [one]) == b""
    assert ours.chunk(one, Delta("a", [300]), [one])
    assert ours.chunk(one, Delta("", []), [one]) == b""


async def test_a_character_of_several_tokens_comes_in_one_event() -> None:
    text = 'x🦜"\n👩‍👩‍👧é'
    tokens = await TOKENIZER.encode(text, add_special_tokens=False)
    assert len(tokens) > len(text), "some characters should be split"
    ours, one = response_format(ChatFormat, {}), choice()
    events = [ours.chunk(one, one.feed(TokenOutput("r", [token])), [one]) for token in tokens]
    assert b"" in events
    contents = [json.loads(event[len("data: ") :])["choices"][0]["delta"]["content"] for event in events if event]
    assert "".join(contents) == text
    assert "\ufffd" not in "".join(contents)


GROUPS = st.lists(st.lists(st.integers(0, 1279) | st.just(END), min_size=1, max_size=4), max_size=30)


@given(groups=GROUPS, prompt=st.sampled_from([[END], [9, 300]]))
def test_the_short_way_of_a_token_gives_the_text_of_the_long_one(groups, prompt) -> None:
    """A stop string that cannot occur makes the choice look at every token's text."""
    short, long = choice(prompt=prompt), choice(prompt=prompt, stop=("\udc80never",))
    for group in groups:
        quick, thorough = short.feed(TokenOutput("r", [*group])), long.feed(TokenOutput("r", [*group]))
        assert quick == thorough
    assert short.completion_tokens == long.completion_tokens == sum(map(len, groups))


@given(groups=GROUPS)
def test_grouping_of_tokens_does_not_change_the_text(groups) -> None:
    grouped, single = choice(), choice()
    text = "".join(grouped.feed(TokenOutput("r", [*group])).text for group in groups)
    assert text == "".join(single.feed(TokenOutput("r", [token])).text for group in groups for token in group)
