"""The unmodified `openai` client works against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest

from raytroupe.cluster.errors import EngineError, QueueFull, ReplicaUnavailable

QUESTION = [{"role": "user", "content": "Where?"}]


@pytest.fixture
async def sdk(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_chat(sdk, engine) -> None:
    answer = await sdk.chat.completions.create(
        model="demo", messages=QUESTION, logprobs=True, top_logprobs=1, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].message.content == "Paris is nice."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[-1].token == "<|end|>"
    assert answer.choices[0].token_ids[-1] == 6
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer._request_id == answer.id
    again = await sdk.chat.completions.create(
        model="demo", messages=[*QUESTION, answer.choices[0].message, {"role": "user", "content": "Why?"}]
    )
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


async def test_chat_stream(sdk) -> None:
    stream = await sdk.chat.completions.create(
        model="demo", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Paris is nice."
    assert chunks[-1].usage.total_tokens > 0


async def test_stream_helper(sdk) -> None:
    async with sdk.chat.completions.stream(model="demo", messages=QUESTION) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Paris is nice."


async def test_completion(sdk) -> None:
    answer = await sdk.completions.create(model="demo", prompt=["a", "b"], logprobs=1, max_tokens=3)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert len(answer.choices[0].logprobs.tokens) == 3
    stream = await sdk.completions.create(model="demo", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Paris is nice."


async def test_models(sdk) -> None:
    assert [model.id async for model in sdk.models.list()] == ["demo"]
    assert (await sdk.models.retrieve("demo")).id == "demo"


async def test_its_error_classes(sdk, engine) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await sdk.chat.completions.create(model="nope", messages=QUESTION)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        await sdk.chat.completions.create(model="demo", messages=QUESTION, temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.APIStatusError) as large:
        await sdk.completions.create(model="demo", prompt="x" * 2_000_000)
    assert large.value.status_code == 413
    for error, kind in (
        (QueueFull("full"), openai.RateLimitError),
        (ReplicaUnavailable("none"), openai.InternalServerError),
        (EngineError("died"), openai.InternalServerError),
    ):
        engine.error = error
        with pytest.raises(kind):
            await sdk.chat.completions.create(model="demo", messages=QUESTION)
    engine.error_after = 1
    stream = await sdk.chat.completions.create(model="demo", messages=QUESTION, stream=True)
    with pytest.raises(openai.APIError, match="the engine failed"):
        async for _ in stream:
            pass
