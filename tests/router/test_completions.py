"""`/v1/completions`, and the small endpoints."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from raytroupe import __version__


async def complete(client: httpx.AsyncClient, prompt: Any, **body: Any) -> dict[str, Any]:
    response = await client.post("completions", json={"model": "demo", "prompt": prompt, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def complete_stream(client: httpx.AsyncClient, prompt: Any, **body: Any) -> list[dict[str, Any]]:
    response = await client.post("completions", json={"model": "demo", "prompt": prompt, "stream": True, **body})
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_a_plain_completion(client, engine) -> None:
    body = await complete(client, "The city")
    assert engine.requests[0].prompt == [1, *engine.tokens("The city")]
    assert engine.requests[0].sampling.max_tokens == 16
    assert (body["object"], body["model"], body["id"][:5]) == ("text_completion", "demo", "cmpl-")
    expected = {"index": 0, "text": "Paris is nice.", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert body["choices"] == [expected]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", None),
        (["a", "b"], None),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
async def test_every_form_of_prompt(client, engine, prompt, expected) -> None:
    expected = expected or [[1, *engine.tokens(text)] for text in prompt]
    body = await complete(client, prompt, return_token_ids=True)
    assert [request.prompt for request in engine.requests] == expected
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == expected
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_several_prompts_with_several_choices_are_numbered_prompt_by_prompt(client, engine) -> None:
    engine.script = lambda request: [*request.prompt, *engine.tokens(f" {request.sampling.seed == 3}")]
    body = await complete(client, [[290], [319]], n=2, seed=3)
    first, second = engine.backend.decode([290]), engine.backend.decode([319])
    assert [choice["text"] for choice in body["choices"]] == [
        f"{first} True",
        f"{first} False",
        f"{second} True",
        f"{second} False",
    ]
    chunks = await complete_stream(client, [[290], [319]], n=2, seed=3)
    for index in range(4):
        texts = [c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(texts) == body["choices"][index]["text"]


@pytest.mark.parametrize("prompt", ["Say: ", ["Say: ", "Or: "]])
async def test_echo_puts_the_prompt_before_the_text(client, prompt) -> None:
    texts = [prompt] if isinstance(prompt, str) else prompt
    body = await complete(client, prompt, echo=True)
    assert [choice["text"] for choice in body["choices"]] == [f"{text}Paris is nice." for text in texts]
    chunks = await complete_stream(client, prompt, echo=True)
    for index, text in enumerate(texts):
        streamed = [c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert streamed[0] == text
        assert "".join(streamed) == f"{text}Paris is nice."


async def test_echo_of_token_ids_is_their_text(client, engine) -> None:
    body = await complete(client, [1, *engine.tokens("Hi 👩 ")], echo=True)
    assert body["choices"][0]["text"] == "Hi 👩 Paris is nice."


async def test_special_tokens_appear_on_request(client, engine) -> None:
    engine.script = lambda request: [4, *engine.tokens("x")]
    assert (await complete(client, "a"))["choices"][0]["text"] == "x"
    assert (await complete(client, "a", skip_special_tokens=False))["choices"][0]["text"] == "<|user|>x"
    body = await complete(client, "a", skip_special_tokens=False, include_stop_str_in_output=True)
    assert body["choices"][0]["text"] == "<|user|>x<|end|>"


async def test_logprobs_are_parallel_lists(client, engine) -> None:
    body = await complete(client, "a", logprobs=2)
    logprobs = body["choices"][0]["logprobs"]
    tokens = [engine.backend.decode([token]) for token in engine.tokens("Paris is nice.")] + ["<|end|>"]
    assert logprobs["tokens"] == tokens
    offsets = [0]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    assert logprobs["text_offset"] == offsets
    assert logprobs["token_logprobs"] == [-0.25] * len(offsets)
    assert [(len(top), top[token]) for top, token in zip(logprobs["top_logprobs"], tokens, strict=True)] == [
        (2, -0.25) for _ in tokens
    ]
    chunks = await complete_stream(client, "a", logprobs=2)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [token for part in streamed for token in part["tokens"]] == logprobs["tokens"]
    assert [offset for part in streamed for offset in part["text_offset"]] == logprobs["text_offset"]
    body = await complete(client, "a", logprobs=0)
    assert [list(top) for top in body["choices"][0]["logprobs"]["top_logprobs"]] == [[token] for token in tokens]


async def test_minus_infinity_is_written_as_a_number(client, engine) -> None:
    engine.logprob = float("-inf")
    body = await complete(client, "a", logprobs=1)
    assert set(body["choices"][0]["logprobs"]["token_logprobs"]) == {-9999.0}


async def test_models(client) -> None:
    listed = (await client.get("models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["created"], model["max_model_len"]) == ("demo", "model", 7, 256)
    assert (await client.get("models/demo")).json() == model
    missing = await client.get("models/org/nope")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_health_follows_the_engine(client, engine) -> None:
    assert (await client.get("http://troupe/health")).status_code == 200
    engine.stalled = ["demo"]
    response = await client.get("http://troupe/health")
    assert (response.status_code, response.json()["stalled_models"]) == (503, ["demo"])


async def test_version(client) -> None:
    assert (await client.get("http://troupe/version")).json() == {"version": __version__}
