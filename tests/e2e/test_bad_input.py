"""Bad input over HTTP: a clear error in OpenAI's form, the engine untouched, nothing leaked."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from .conftest import Application

QUESTION = [{"role": "user", "content": "Which country has the capital Nairobi?"}]
CHAT = {"model": "large", "messages": QUESTION, "temperature": 0}

CASES: dict[str, tuple[bytes | dict[str, Any], int, str | None]] = {
    "not JSON": (b'{"model": "large", ', 400, None),
    "not an object": (b"[1, 2]", 400, None),
    "wrong type": ({**CHAT, "temperature": "warm"}, 400, "temperature"),
    "unknown model": ({**CHAT, "model": "nobody"}, 404, "model"),
    "unknown parameter": ({**CHAT, "tempereture": 1}, 400, "tempereture"),
    "out of range": ({**CHAT, "top_p": 1.5}, 400, "top_p"),
    "no messages": ({**CHAT, "messages": []}, 400, "messages"),
    "prompt too long": ({**CHAT, "messages": [{"role": "user", "content": "word " * 5000}]}, 400, "messages"),
    "max_tokens beyond the context": ({**CHAT, "max_tokens": 1_000_000}, 400, "max_tokens"),
    "a billion choices": ({**CHAT, "n": 10**9}, 400, "n"),
    "100,000 stop strings": ({**CHAT, "stop": ["x"] * 10**5}, 400, "stop"),
    "bias for a token that does not exist": ({**CHAT, "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    "lone surrogate": (json.dumps({**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}).encode(), 400, None),
    "10 MB": (json.dumps({**CHAT, "messages": [{"role": "user", "content": "x" * 10**7}]}).encode(), 413, None),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_request_is_refused_and_harms_nothing(application: Application, case: str) -> None:
    body, status, parameter = CASES[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = application.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    if parameter is not None:
        assert error["param"] == parameter

    good = application.http.post("/v1/chat/completions", json=CHAT)
    assert good.json()["choices"][0]["message"]["content"] == "Nairobi is the capital of Kenya."
    application.assert_idle("large")


def test_full_queue_is_a_429_that_says_when_to_retry(application: Application) -> None:
    """Two requests run, two wait; of the others some are refused, and nobody gets a wrong answer."""
    body = {"model": "small", "prompt": "The capital", "max_tokens": 300, "ignore_eos": True, "temperature": 0}

    def ask(_: int) -> httpx.Response:
        return application.http.post("/v1/completions", json=body)

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(ask, range(16)))
    refused = [reply for reply in replies if reply.status_code != 200]
    served = [reply for reply in replies if reply.status_code == 200]
    assert len(served) >= 4, [reply.text for reply in refused]
    assert refused, "16 requests at once do not fit into 2 places and a queue of 2"
    for reply in refused:
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["code"] == "queue_full"
    assert len({reply.json()["choices"][0]["text"] for reply in served}) == 1
    application.assert_idle("small")
