"""`/v1/chat/completions`: bodies and streams as OpenAI and vLLM define them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

QUESTION = [{"role": "user", "content": "Where?"}]


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("chat/completions", json={"model": "demo", "messages": QUESTION, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def ask_stream(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    """Chunks of a stream, which must end with the end mark."""
    request = {"model": "demo", "messages": QUESTION, "stream": True, **body}
    response = await client.post("chat/completions", json=request)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """Text of a choice of a stream."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def test_a_plain_answer(client, engine) -> None:
    engine.cached_tokens = 2
    body = await ask(client)
    prompt = engine.requests[0].prompt
    assert prompt == [1, 4, *engine.tokens("Where?"), 6, 5]
    assert body["object"] == "chat.completion"
    assert body["model"] == "demo"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Paris is nice.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    completion = len(engine.tokens("Paris is nice.")) + 1
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": completion,
        "total_tokens": len(prompt) + completion,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_a_stream_says_the_role_once_then_text_then_why_it_ended(client) -> None:
    chunks = await ask_stream(client)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks) == "Paris is nice."
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["id"] == chunks[0]["id"] for chunk in chunks)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("tokens_per_output", [1, 2, 3, 50])
async def test_streamed_text_equals_the_plain_answer_however_tokens_are_grouped(
    client, engine, tokens_per_output
) -> None:
    text = "Emoji 👩‍👩‍👧, 世界 and é: STOP here"
    engine.script = lambda request: engine.tokens(text)
    engine.tokens_per_output = tokens_per_output
    for stop in ([], ["STOP"], ["世界 a", "nd"], ["never"]):
        expected = text.split(min(stop, key=lambda s: (text + s).index(s)))[0] if stop else text
        plain = await ask(client, stop=stop)
        assert plain["choices"][0]["message"]["content"] == expected
        assert joined(await ask_stream(client, stop=stop)) == expected


async def test_an_unfinished_character_at_the_end_is_dropped_in_both_forms(client, engine) -> None:
    engine.script = lambda request: engine.tokens("ok 👩")
    cut = len(engine.tokens("ok 👩")) - 1
    assert (await ask(client, max_tokens=cut))["choices"][0]["message"]["content"] == "ok "
    chunks = await ask_stream(client, max_tokens=cut)
    assert joined(chunks) == "ok "
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_stop_string_ends_the_engine_request_and_is_reported(client, engine) -> None:
    engine.hold_after = 8
    engine.script = lambda request: engine.tokens("one two three four five six seven")
    body = await ask(client, stop=["three"])
    choice = body["choices"][0]
    assert choice["message"]["content"] == "one two "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "three")
    assert not engine.running
    body = await ask(client, stop="three", include_stop_str_in_output=True)
    assert body["choices"][0]["message"]["content"] == "one two three"


async def test_tokens_after_a_stop_string_are_not_counted(client, engine) -> None:
    engine.script = lambda request: engine.tokens("a1b2c3")
    counts = set()
    for engine.tokens_per_output in (1, 4, 50):
        body = await ask(client, stop=["2"], return_token_ids=True)
        assert body["choices"][0]["token_ids"] == engine.tokens("a1b2")
        counts.add(body["usage"]["completion_tokens"])
    assert counts == {len(engine.tokens("a1b2"))}


async def test_stop_tokens_of_the_client_are_reported_and_shown_only_if_wanted(client, engine) -> None:
    stop = engine.tokens(" is")[0]
    body = await ask(client, stop_token_ids=[stop])
    choice = body["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("Paris", "stop", stop)
    body = await ask(client, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert body["choices"][0]["message"]["content"] == "Paris is"


async def test_stop_strings_wait_for_the_minimum_of_tokens(client, engine) -> None:
    engine.script = lambda request: engine.tokens("x x x x x")
    body = await ask(client, stop=["x"], min_tokens=len(engine.tokens("x x")))
    assert body["choices"][0]["message"]["content"] == "x x "


async def test_choices_have_their_own_seeds_and_count_the_prompt_once(client, engine) -> None:
    engine.script = lambda request: engine.tokens(f"seed {request.sampling.seed}")
    for body in (await ask(client, n=3, seed=5), await ask(client, n=3, seed=5)):
        texts = [choice["message"]["content"] for choice in body["choices"]]
        assert texts[0] == "seed 5"
        assert len(set(texts)) == 3
        assert body["usage"]["prompt_tokens"] == len(engine.requests[0].prompt)
    chunks = await ask_stream(client, n=3, seed=5, stream_options={"include_usage": True})
    assert [joined(chunks, index) for index in range(3)] == texts
    assert chunks[-1]["usage"] == body["usage"]
    assert {request.prompt == engine.requests[0].prompt for request in engine.requests} == {True}


async def test_usage_comes_last_and_only_if_asked_for(client, engine) -> None:
    chunks = await ask_stream(client, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(engine.tokens("Paris is nice.")) + 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    chunks = await ask_stream(client, stream_options={"continuous_usage_stats": True})
    counted = [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk]
    assert counted == sorted(counted)
    assert counted[-1] == len(engine.tokens("Paris is nice.")) + 1


async def test_token_ids_are_returned_on_request(client, engine) -> None:
    expected = [*engine.tokens("Paris is nice."), 6]
    body = await ask(client, return_token_ids=True)
    assert body["choices"][0]["token_ids"] == expected
    assert body["prompt_token_ids"] == engine.requests[0].prompt
    chunks = await ask_stream(client, return_token_ids=True)
    assert [t for chunk in chunks for choice in chunk["choices"] for t in choice.get("token_ids", [])] == expected
    assert chunks[0]["prompt_token_ids"] == engine.requests[0].prompt


async def test_logprobs_name_every_token_with_its_bytes(client, engine) -> None:
    engine.script = lambda request: engine.tokens("é!")
    body = await ask(client, logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["bytes:\\xc3", "bytes:\\xa9", "!", "<|end|>"]
    assert [entry["bytes"] for entry in content[:3]] == [[0xC3], [0xA9], [0x21]]
    assert [entry["logprob"] for entry in content] == [-0.25] * 4
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    chunks = await ask_stream(client, logprobs=True, top_logprobs=2)
    streamed = [e for chunk in chunks for c in chunk["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]
    assert streamed == content
    body = await ask(client, logprobs=True)
    assert [entry["top_logprobs"] for entry in body["choices"][0]["logprobs"]["content"]] == [[]] * 4


async def test_sampling_parameters_reach_the_engine(client, engine) -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.25,
        "min_tokens": 2,
    }
    await ask(client, **given, seed=-1, max_completion_tokens=9, logit_bias={"5": -100, "7": 1.5}, stop_token_ids=[9])
    sampling = engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert (sampling.seed, sampling.max_tokens) == (2**64 - 1, 9)
    assert sampling.logit_bias == {5: -100.0, 7: 1.5}
    assert sampling.stop_token_ids == (9, 6, 2)
    await ask(client, ignore_eos=True, max_tokens=4, priority=-3, cache_salt="tenant")
    request = engine.requests[1]
    assert request.sampling.stop_token_ids == ()
    assert (request.priority, request.cache_salt) == (-3, "tenant")


@pytest.mark.parametrize(
    ("messages", "threads"),
    [
        (QUESTION, 0),
        (QUESTION * 1000, 1),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x" * 20_000}}]}], 1),
    ],
)
async def test_large_conversations_are_rendered_beside_the_event_loop(client, monkeypatch, messages, threads) -> None:
    calls = []
    run = asyncio.to_thread

    async def counted(function, *args, **kwargs):
        calls.append(function.__name__)
        return await run(function, *args, **kwargs)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    await client.post("chat/completions", json={"model": "demo", "messages": messages})
    assert calls.count("render") == threads


async def test_defaults_come_from_the_model_and_the_context(client, engine, card) -> None:
    card.default_sampling.update(temperature=0.6, top_p=0.8, top_k=20, repetition_penalty=1.05)
    await ask(client)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.6, 0.8, 20, 1.05)
    assert sampling.max_tokens == card.max_model_len - len(engine.requests[0].prompt)
    await ask(client, temperature=0, top_k=-1)
    assert (engine.requests[1].sampling.temperature, engine.requests[1].sampling.top_k) == (0, 0)
    assert engine.requests[0].sampling.seed != engine.requests[1].sampling.seed


async def test_null_means_the_default_and_idle_fields_are_accepted(client) -> None:
    await ask(
        client,
        temperature=None,
        stop=None,
        n=None,
        logprobs=None,
        stream_options=None,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        functions=None,
        user="someone",
        metadata={"a": 1},
        store=True,
        service_tier="auto",
    )


async def test_messages_in_all_their_forms(client, engine) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = (await ask(client))["choices"][0]["message"]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": parts}, answer]
    await ask(client, messages=[*messages, {"role": "user", "content": "go", "name": "Ada"}])
    text = engine.backend.decode(engine.requests[1].prompt, skip_special_tokens=False)
    answered = "<|bos|><|system|>S<|end|><|user|>one\ntwo<|end|><|assistant|>Paris is nice.<|end|>"
    assert text == f"{answered}<|user|>go<|end|><|assistant|>"


async def test_a_last_message_can_be_continued(client, engine) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "In Par"}]
    await ask(client, messages=messages, continue_final_message=True)
    assert engine.backend.decode(engine.requests[0].prompt, skip_special_tokens=False).endswith("<|assistant|>In Par")
    await ask(client, add_generation_prompt=False, add_special_tokens=True)
    assert engine.requests[1].prompt == [1, 1, 4, *engine.tokens("Where?"), 6]
