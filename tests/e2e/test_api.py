"""The product as a client sees it, with an unmodified `openai` package."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import openai
import pytest

from raytroupe import __version__

if TYPE_CHECKING:
    from .conftest import Application

NAIROBI = "Which country has the capital Nairobi?"
KENYA = "Nairobi is the capital of Kenya."
"""demo-large's greedy answer, which is right."""


def test_chat_answers_right(application: Application) -> None:
    reply = application.openai.chat.completions.create(
        model="large", messages=[{"role": "user", "content": NAIROBI}], temperature=0
    )
    assert reply.choices[0].message.content == KENYA
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_stream_says_the_same_in_pieces(application: Application) -> None:
    chunks = list(
        application.openai.chat.completions.create(
            model="large",
            messages=[{"role": "user", "content": NAIROBI}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == KENYA
    assert sum(bool(piece) for piece in pieces) > 1
    assert chunks[-1].usage.completion_tokens > 1


def test_completion_takes_and_returns_token_ids(application: Application) -> None:
    whole = application.openai.completions.create(
        model="large", prompt="The capital", temperature=0, max_tokens=12, extra_body={"return_token_ids": True}
    )
    ids = whole.choices[0].model_extra["token_ids"]
    assert len(ids) == whole.usage.completion_tokens == 12
    prompt = whole.choices[0].model_extra["prompt_token_ids"]
    rest = application.openai.completions.create(
        model="large", prompt=prompt + ids[:5], temperature=0, max_tokens=7, extra_body={"return_token_ids": True}
    )
    assert rest.choices[0].model_extra["token_ids"] == ids[5:]


def test_models_health_and_version(application: Application) -> None:
    assert [model.id for model in application.openai.models.list()] == [
        "large",
        "small",
        "large-tp2-pp2",
        "large-twice",
        "auto",
        "pair",
    ]
    assert application.http.get("/health").status_code == 200
    assert application.http.get("/version").json() == {"version": __version__}


def test_printed_curl_command_works_as_printed(application: Application) -> None:
    command = next(line for _, line in application.lines if "curl " in line).partition("curl ")[2]
    output = subprocess.run(
        f"curl --silent --show-error {command}", shell=True, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(output.stdout)["choices"][0]["message"]["content"] == KENYA


def test_tensor_and_pipeline_shards_answer_like_one(application: Application) -> None:
    questions = [
        NAIROBI,
        "What is 4 + 5?",
        "Name the capital of Morocco.",
        "What is 123 + 456?",
        "Spell the word planet.",
        "Sort these numbers: 9 3 7 1",
        "What is the opposite of hot?",
        "Reverse the word stream.",
    ]
    with ThreadPoolExecutor(len(questions)) as pool:  # at once, so that the stages work on different sequences
        one = list(pool.map(lambda text: application.answer("large", text, max_tokens=64), questions))
        divided = list(pool.map(lambda text: application.answer("large-tp2-pp2", text, max_tokens=64), questions))
    assert divided == one
    assert one[0] == KENYA
    application.assert_idle("large-tp2-pp2")


def test_metrics_are_published(application: Application) -> None:
    from .conftest import eventually

    application.answer("large", NAIROBI)
    wanted = {
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket",
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_hits_total",
        "prefix_cache_queries_total",
        "num_preemptions_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
    }

    def missing() -> set[str]:
        lines = application.http.get("/metrics").text.splitlines()
        present = {line.partition("{")[0] for line in lines if 'model_name="large"' in line}
        return {name for name in wanted if f"ray_troupe_{name}" not in present}

    eventually(lambda: not missing(), 40, lambda: f"not at /metrics: {missing()}")


def test_sampled_answers_depend_on_the_seed_only(application: Application) -> None:
    def story(seed: int) -> str:
        reply = application.openai.completions.create(
            model="large-twice",
            prompt="The capital",
            temperature=1.5,
            seed=seed,
            max_tokens=40,
            extra_body={"ignore_eos": True},
        )
        return reply.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(story, [1, 2, 1, 2, 1, 2, 1, 2]))
    assert set(told[::2]) == {told[0]}, "the same seed on either replica, alone or in a batch"
    assert set(told[1::2]) == {told[1]}
    assert told[0] != told[1]


def test_unknown_model_is_a_404_of_openais_kind(application: Application) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        application.answer("nobody", NAIROBI)
    assert caught.value.body["code"] == "model_not_found"
    assert "large-tp2-pp2" in caught.value.body["message"], "the message lists what is served"
