"""Bad input: a clear error in OpenAI's form, nothing reaches the engine, and the next request is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from raytroupe.cluster.errors import EngineError, QueueFull, ReplicaUnavailable
from raytroupe.router.api import build_app

CHAT, COMPLETION = "chat/completions", "completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"model": "demo", "messages": MESSAGES},
    COMPLETION: {"model": "demo", "prompt": "Hi"},
}


def check_error(response: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of a well-formed error body."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert len(error["message"]) < 500
    return error["message"]


@pytest.fixture
async def check_untouched(client, engine):
    """After the test: the engine has seen nothing, and a normal request still works."""
    yield
    assert engine.requests == []
    response = await client.post(CHAT, json=BASE[CHAT])
    assert response.status_code == 200


BAD_VALUES = [
    # endpoint, fields, parameter, what the message says
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": None}, "messages", "messages = null"),
    (CHAT, {"messages": "Hi"}, "messages", "list"),
    (CHAT, {"messages": ["Hi"]}, "messages", r"messages\[0\]"),
    (CHAT, {"messages": [{"role": "user", "content": ""}] * 20_000}, "messages", "at most 4096"),
    (CHAT, {"messages": [{}] * 240_000}, "messages[0].role", "required"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 5000}]}, "messages", "4096"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}] * 129}]}, "messages", "at most 128"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "required"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages", r"messages\[0\].content: required"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages", r"messages\[0\].content = 5"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo", "unknown parameter"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
        "must be 'text'",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x " * 300}]}, "messages", "603 tokens.* 256"),
    (CHAT, {"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens", "differ"),
    (CHAT, {"max_completion_tokens": 300}, "max_completion_tokens", "= 300.*256.*at most 250"),
    (CHAT, {"logprobs": 3}, "logprobs", "boolean"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", ">= 0 and <= 20"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "logprobs = true"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", "not supported"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (CHAT, {"functions": [{}]}, "functions", "not supported"),
    (CHAT, {"audio": {"voice": "x"}}, "audio", "not supported"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "must not set messages"),
    (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "exclude"),
    (CHAT, {"echo": True}, "echo", "unknown parameter: echo"),
    (COMPLETION, {"prompt": ""}, "prompt", "empty"),
    (COMPLETION, {"prompt": []}, "prompt", "at least 1"),
    (COMPLETION, {"prompt": ["a", ""]}, "prompt", "empty"),
    (COMPLETION, {"prompt": [[]]}, "prompt", "empty"),
    (COMPLETION, {"prompt": None}, "prompt", "null"),
    (COMPLETION, {"prompt": {}}, "prompt", "string"),
    (COMPLETION, {"prompt": [1, "a"]}, "prompt", r"prompt\[1\] = 'a'"),
    (COMPLETION, {"prompt": [True]}, "prompt", r"prompt\[0\] = true"),
    (COMPLETION, {"prompt": [-1]}, "prompt", r"prompt\[0\] = -1"),
    (COMPLETION, {"prompt": [5, 1280]}, "prompt", "1280 does not exist.* 0 to 1279"),
    (COMPLETION, {"prompt": [2**80]}, "prompt", "does not exist"),
    (COMPLETION, {"prompt": [5] * 256}, "prompt", "256 tokens.* 256"),
    (COMPLETION, {"prompt": ["a"] * 1025}, "prompt", "1024"),
    (COMPLETION, {"prompt": ["a"] * 20, "n": 128}, "n", "1024"),
    (COMPLETION, {"suffix": "x"}, "suffix", "not supported"),
    (COMPLETION, {"best_of": 3}, "best_of", "only n"),
    (COMPLETION, {"echo": True, "logprobs": 0}, "echo", "not supported"),
    (COMPLETION, {"prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
    (COMPLETION, {"logprobs": True}, "logprobs", "integer"),
    (COMPLETION, {"max_tokens": 10**40}, "max_tokens", "at most 253"),
]
BAD_EVERYWHERE = [
    ({"n": 10**9}, "n", "n = 1000000000: must be >= 1 and <= 128"),
    ({"n": 0}, "n", ">= 1 and <= 128"),
    ({"n": "2"}, "n", "n = '2'.*>= 1"),
    ({"n": 10**4000}, "n", "more than 77 digits"),
    ({"temperature": 2.5}, "temperature", "temperature = 2.5: must be >= 0 and <= 2"),
    ({"temperature": -0.1}, "temperature", ">= 0"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"temperature": True}, "temperature", "true"),
    ({"top_p": 0}, "top_p", "> 0 and <= 1"),
    ({"top_k": -2}, "top_k", ">= -1"),
    ({"min_p": 2}, "min_p", "<= 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "> 0"),
    ({"presence_penalty": 2.1}, "presence_penalty", ">= -2 and <= 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", ">= -2 and <= 2"),
    ({"seed": 2**64}, "seed", "< 18446744073709551616"),
    ({"seed": 1.5}, "seed", "integer"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"max_tokens": 10_000}, "max_tokens", "10000.*256"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens"),
    ({"stop": ["x"] * 100_000}, "stop", "at most 64"),
    ({"stop": "x" * 1001}, "stop", "at most 1000"),
    ({"stop": ""}, "stop", "at least 1"),
    ({"stop": [1]}, "stop", r"stop\[0\] = 1"),
    ({"stop_token_ids": [1280]}, "stop_token_ids", "1280 does not exist"),
    ({"stop_token_ids": [5] * 65}, "stop_token_ids", "at most 64"),
    ({"logit_bias": {"1280": 1}}, "logit_bias", "'1280' is not a token id.*1279"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"5": 101}}, "logit_bias", r"logit_bias.5 = 101.*100"),
    ({"logit_bias": {"5": -101}}, "logit_bias", "-100"),
    ({"logit_bias": [5]}, "logit_bias", "dictionary"),
    ({"logit_bias": {str(token): 1 for token in range(5000)}}, "logit_bias", "at most 4096"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown parameter"),
    ({"priority": 11}, "priority", "priority = 11: must be >= -10 and <= 10"),
    ({"priority": -11}, "priority", ">= -10 and <= 10"),
    ({"cache_salt": ""}, "cache_salt", "at least 1"),
    ({"temprature": 1}, "temprature", "unknown parameter: temprature"),
    ({"model": 5}, "model", "string"),
]


@pytest.mark.usefixtures("check_untouched")
@pytest.mark.parametrize(("endpoint", "fields", "param", "message"), BAD_VALUES)
async def test_a_bad_value_is_refused_by_name(client, endpoint, fields, param, message) -> None:
    response = await client.post(endpoint, content=json.dumps(BASE[endpoint] | fields))
    assert_matches(check_error(response, 400, param), message)


@pytest.mark.usefixtures("check_untouched")
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETION])
@pytest.mark.parametrize(("fields", "param", "message"), BAD_EVERYWHERE)
async def test_a_bad_shared_value_is_refused_by_name(client, endpoint, fields, param, message) -> None:
    response = await client.post(endpoint, content=encode(BASE[endpoint] | fields))
    assert_matches(check_error(response, 400, param), message)


def encode(data: Any) -> bytes:
    """JSON of `data`, whose integers may have more digits than Python likes to print."""
    import sys

    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(data).encode()
    finally:
        sys.set_int_max_str_digits(before)


def assert_matches(message: str, pattern: str) -> None:
    import re

    assert re.search(pattern, message), message


BODIES = {
    "empty": b"",
    "not json": b"{",
    "trailing text": b"{} {}",
    "not utf-8": b'{"model": "\xff"}',
    "nan": b'{"model": "demo", "temperature": NaN}',
    "infinity": b'{"model": "demo", "temperature": Infinity}',
    "huge float": b'{"model": "demo", "temperature": 1e999}',
    "huge integer": b'{"model": "demo", "n": ' + b"9" * 5000 + b"}",
    "high surrogate": rb'{"model": "demo", "prompt": "\ud800", "messages": []}',
    "low surrogate": rb'{"model": "demo", "prompt": "a\udc00b"}',
    "surrogate in utf-8": b'{"model": "demo", "prompt": "\xed\xa0\x80"}',
    "surrogate in a key": rb'{"model": "demo", "logit_bias": {"\ud800": 1}}',
    "deep list": b"[" * 50_000,
    "deep object": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "list": b"[]",
    "text": b'"hello"',
    "number": b"5",
    "null": b"null",
}


@pytest.mark.usefixtures("check_untouched")
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETION])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_a_malformed_body_is_refused(client, endpoint, body) -> None:
    message = check_error(await client.post(endpoint, content=body), 400)
    assert message.startswith("the request body")


@pytest.mark.usefixtures("check_untouched")
@pytest.mark.parametrize("name", ["gpt-5", "Demo", "x" * 5000])
async def test_an_unknown_model_is_not_found(client, name) -> None:
    for endpoint in (CHAT, COMPLETION):
        message = check_error(await client.post(endpoint, json=BASE[endpoint] | {"model": name}), 404, "model")
        assert "served: demo" in message


@pytest.mark.usefixtures("check_untouched")
async def test_unknown_paths_and_methods_have_the_same_form(client) -> None:
    assert "POST /v1/embeddings" in check_error(await client.post("embeddings", json={}), 404)
    response = await client.get(CHAT)
    check_error(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.usefixtures("check_untouched")
async def test_a_body_over_the_limit_is_refused_declared_or_not(client) -> None:
    async def chunks():
        for _ in range(1000):
            yield b" " * 10_000

    assert "1000000" in check_error(await client.post(CHAT, content=b" " * 1_000_001), 413)
    assert "1000000" in check_error(await client.post(CHAT, content=chunks()), 413)
    check_error(await client.post(CHAT, content=b"x", headers={"content-length": "9" * 5000}), 413)
    assert (await client.post(CHAT, content=b" " * 1_000_000)).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_full_queue_is_429_with_retry_after(client, engine, stream, n) -> None:
    engine.error = QueueFull("1024 requests wait already; try again later", retry_after=7)
    response = await client.post(CHAT, json=BASE[CHAT] | {"stream": stream, "n": n})
    check_error(response, 429)
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert not engine.running


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ReplicaUnavailable("no replica"), 503, "no replica"),
        (EngineError("rank 1 of node 10.1.2.3 died"), 500, "the engine failed"),
        (ZeroDivisionError("secret"), 500, "internal server error"),
    ],
)
async def test_our_own_failures_leak_nothing(client, engine, error, status, message) -> None:
    engine.error = error
    for stream in (False, True):
        assert message in check_error(await client.post(CHAT, json=BASE[CHAT] | {"stream": stream}), status)


@pytest.mark.parametrize("n", [1, 2])
async def test_an_error_after_the_first_token_is_an_event_of_the_stream(client, engine, n) -> None:
    engine.error, engine.error_after = ReplicaUnavailable("the replica is gone"), 2
    response = await client.post(COMPLETION, json=BASE[COMPLETION] | {"stream": True, "n": n})
    assert response.status_code == 200
    *_, event, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    error = json.loads(event.removeprefix("data: "))["error"]
    assert (error["message"], error["type"]) == ("the replica is gone", "server_error")
    assert not engine.running


async def test_an_engine_that_ends_without_a_reason_is_an_error(client, engine, monkeypatch) -> None:
    async def generate(model, request):
        for output in ():
            yield output

    monkeypatch.setattr(engine, "generate", generate)
    check_error(await client.post(CHAT, json=BASE[CHAT]), 500)


@pytest.fixture
def model_with(tmp_path: Path, card, engine):
    """A client for a copy of the demo model with another chat template."""

    def make(template: str | None) -> httpx.AsyncClient:
        source = Path(card.path)
        shutil.copy(source / "tokenizer.json", tmp_path)
        config = json.loads((source / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        app = build_app([msgspec.structs.replace(card, path=str(tmp_path))], engine)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://troupe/v1/")

    return make


async def test_a_chat_template_that_raises_is_the_requests_fault(model_with, engine) -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('begin with a system message') }}{% endif %}ok"
    async with model_with(template) as client:
        message = check_error(await client.post(CHAT, json=BASE[CHAT]), 400, "messages")
        assert message == "the chat template refused the messages: begin with a system message"
        assert engine.requests == []
        messages = [{"role": "system", "content": "x"}]
        assert (await client.post(CHAT, json={"model": "demo", "messages": messages})).status_code == 200


async def test_without_a_chat_template_there_are_completions_only(model_with) -> None:
    async with model_with(None) as client:
        assert "no chat template" in check_error(await client.post(CHAT, json=BASE[CHAT]), 400, "messages")
        assert (await client.post(COMPLETION, json=BASE[COMPLETION])).status_code == 200


async def test_an_empty_prompt_from_the_template_is_refused(model_with) -> None:
    async with model_with("{{ '' }}") as client:
        assert "empty prompt" in check_error(await client.post(CHAT, json=BASE[CHAT]), 400, "messages")
