"""The client tells answers, refusals and broken streams apart, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.bench.client import BenchClient, Outcome, ServerOptions, parse_url
from raytroupe.deploy.bench.workload import Request

from .conftest import StreamServer

PROMPT = [20, 21, 22]


def ask(url: str, model: str = "plain", count: int = 1, output_len: int = 6, **options: Any) -> list[Outcome]:
    """`count` requests, one after the other over one client."""

    async def run() -> list[Outcome]:
        client = BenchClient(ServerOptions(url=parse_url(url), model=model, **options))
        prompt = "hello" if options.get("chat") else PROMPT
        request = Request(prompt, 3, output_len)
        outcomes = []
        for _ in range(count):
            now = time.perf_counter()
            outcome = Outcome(prompt_len=3, wanted_len=output_len, scheduled=now, sent=now)
            await client.complete(client.encode(request), outcome)
            outcomes.append(outcome)
        client.close()
        return outcomes

    return asyncio.run(run())


def ask_once(url: str, model: str = "plain", **options: Any) -> Outcome:
    return ask(url, model, **options)[0]


@pytest.mark.parametrize("model", ["plain", "dripping", "carriage-returns"])
@pytest.mark.parametrize("chat", [False, True])
def test_tokens_are_seen_and_counted_by_usage(server: StreamServer, model: str, chat: bool) -> None:
    outcome = ask_once(server.url, model, chat=chat)
    assert outcome.error is None
    assert len(outcome.token_times) == outcome.output_len == 6
    assert outcome.counted_by_usage
    assert (outcome.prompt_len, outcome.cached_tokens) == (7, 3)
    assert outcome.scheduled <= outcome.sent <= outcome.token_times[0]
    assert sorted(outcome.token_times) == outcome.token_times
    assert outcome.token_times[-1] <= outcome.finished


def test_what_is_sent(server: StreamServer) -> None:
    ask_once(server.url, headers={"authorization": "Bearer secret"})
    assert server.requests == [
        {
            "model": "plain",
            "max_tokens": 6,
            "temperature": 0.0,
            "stream": True,
            "prompt": PROMPT,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert server.headers[0]["authorization"] == "bearer secret"
    ask_once(server.url, chat=True, ignore_eos=False, include_usage=False)
    assert server.requests[1] == {
        "model": "plain",
        "max_tokens": 6,
        "temperature": 0.0,
        "stream": True,
        "messages": [{"role": "user", "content": "hello"}],
    }


def test_gaps_between_tokens_are_those_of_the_server(server: StreamServer) -> None:
    outcome = ask_once(server.url, "slow")
    assert outcome.token_times[-1] - outcome.token_times[0] > 5 * 0.04, "50 ms lie between two tokens"
    assert outcome.token_times[0] - outcome.sent > 0.04


def test_without_usage_events_are_counted(server: StreamServer) -> None:
    outcome = ask_once(server.url, "no-usage")
    assert outcome.error is None
    assert outcome.output_len == 6
    assert not outcome.counted_by_usage


def test_one_connection_serves_requests_in_turn(server: StreamServer) -> None:
    assert [outcome.error for outcome in ask(server.url, count=3)] == [None, None, None]
    assert server.connections == 1


def test_full_and_broken_servers_are_told_apart(server: StreamServer) -> None:
    outcomes = ask(server.url, "full-after-two", count=3)
    assert [(outcome.error, outcome.rejected) for outcome in outcomes[1:]] == [(None, False), ("HTTP 429", True)]
    assert outcomes[2].detail == "queue is full"
    broken = ask_once(server.url, "broken-after-two")
    assert (broken.error, broken.rejected, broken.detail) == ("HTTP 500", False, "a shard died")


@pytest.mark.parametrize(
    ("model", "error", "detail"),
    [
        ("cut", "cut off", ""),
        ("malformed", "malformed event", "truncated"),
        ("error-event", "error event", "out of memory"),
        ("no-end", "cut off", "without a finish reason"),
    ],
)
def test_broken_streams_are_errors(server: StreamServer, model: str, error: str, detail: str) -> None:
    outcome = ask_once(server.url, model)
    assert outcome.error == error
    assert detail in outcome.detail
    assert not outcome.rejected
    assert len(outcome.token_times) >= 2, "the tokens that came are kept"


def test_an_answer_that_takes_too_long_times_out(server: StreamServer) -> None:
    start = time.perf_counter()
    outcome = ask_once(server.url, "slow", output_len=100, timeout=0.3)
    assert outcome.error == "timed out"
    assert time.perf_counter() - start < 3


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert ask_once(f"http://127.0.0.1:{port}").error == "cannot connect"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "cut off"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "cut off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\ndata: {}\n\n", "cut off"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: [DONE]\n\n", "no tokens"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "cut off"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", "HTTP 503"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 2\r\n\r\n\xff[", "HTTP 502"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": 3}\n\n', "malformed event"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: "\xff"\n\n', "malformed event"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n', None),
    ],
)
def test_answers_of_other_programs(raw_server: Callable[[bytes], str], answer: bytes, error: str | None) -> None:
    outcome = ask_once(raw_server(answer))
    assert outcome.error == error
    assert outcome.rejected == (error == "HTTP 503")


def test_a_closed_idle_connection_is_replaced(raw_server: Callable[[bytes], str]) -> None:
    body = b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n'
    url = raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)  # and closes
    assert [outcome.error for outcome in ask(url, count=4)] == [None] * 4


@pytest.mark.parametrize(
    ("text", "path"),
    [("http://h:1", "/v1"), ("http://h:1/", "/v1"), ("https://h/api/v1/", "/api/v1"), ("http://[::1]:8000", "/v1")],
)
def test_address_of_the_api(text: str, path: str) -> None:
    assert parse_url(text).path == path


@pytest.mark.parametrize("text", ["", "localhost:8000", "ftp://h", "http://", "http://h:port", "http://h:99999"])
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="http://"):
        parse_url(text)
