"""A small OpenAI-like server over real sockets; the model's name says how it behaves."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raytroupe.deploy import cli

WORDS = ["Grüße", " 世界", " 🙂", " end"]
FULL = ("429 Too Many Requests", {"error": {"message": "queue is full", "code": "queue_full"}})
BROKEN = ("500 Internal Server Error", {"error": {"message": "a shard died"}})


class StreamServer:
    """Answers `/v1/models` and both streaming endpoints. `requests` has every body that came, in order."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.arrivals: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.under_way = 0
        self.most_under_way = 0
        self.models = ["plain"]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = server.result(5)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        async def stop() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if lines[0].startswith("GET"):
                    self._whole(writer, "200 OK", {"data": [{"id": name} for name in self.models]})
                else:
                    self.headers.append(headers)
                    await self._answer(writer, json.loads(body), chat="chat" in lines[0])
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, Any], chat: bool) -> None:
        self.requests.append(body)
        self.arrivals.append(time.perf_counter())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            refusal = self._refusal(body)
            if refusal is not None:
                self._whole(writer, *refusal)
            elif not body.get("stream"):
                self._whole(writer, "200 OK", {"choices": []})
            else:
                await self._stream(writer, body, chat)
        finally:
            self.under_way -= 1

    def _refusal(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        """Status and body for the models that refuse."""
        model, nth = body["model"], len(self.requests)
        if model == "full-after-two" and nth > 2:
            return FULL
        if model == "broken-after-two" and nth > 2:
            return BROKEN
        if model == "openai" and "ignore_eos" in body:
            return "400 Bad Request", {"error": {"message": "Unrecognized request argument: ignore_eos"}}
        if model == "small-vocabulary" and max(body["prompt"]) >= 5000:
            return "400 Bad Request", {"error": {"message": "token id does not exist"}}
        if model == "locked" and self.headers[-1].get("authorization") != "bearer secret":
            return "401 Unauthorized", {"error": {"message": "no key"}}
        return None

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], chat: bool) -> None:
        model, count = body["model"], body["max_tokens"]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        end = "\r\n" if model == "carriage-returns" else "\n"

        async def send(data: str) -> None:
            event = f": a comment{end}data: {data}{end}{end}".encode()
            pieces = [event[at : at + 3] for at in range(0, len(event), 3)] if model == "dripping" else [event]
            for piece in pieces:
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                await writer.drain()
                if model == "dripping":
                    await asyncio.sleep(0)

        def choice(text: str, finish: str | None = None) -> str:
            content: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
            fields = {"id": "x", "choices": [{"index": 0, **content, "finish_reason": finish}], "usage": None}
            return json.dumps(fields, ensure_ascii=False)

        if chat:
            await send(json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
        for index in range(count):
            if model == "slow":
                await asyncio.sleep(0.05)
            if index == 2 and model == "cut":
                writer.transport.abort()
                return
            if index == 2 and model == "malformed":
                await send('{"choices": [')
            if index == 2 and model == "error-event":
                await send(json.dumps({"error": {"message": "out of memory"}}))
            last = index == count - 1 and model != "no-end"
            await send(choice(WORDS[index % len(WORDS)], "length" if last else None))
        if body.get("stream_options", {}).get("include_usage") and model != "no-usage":
            usage = {"prompt_tokens": 7, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 3}}
            await send(json.dumps({"choices": [], "usage": usage}))
        if model != "no-end":
            await send("[DONE]")
        writer.write(b"0\r\n\r\n")

    @staticmethod
    def _whole(writer: asyncio.StreamWriter, status: str, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


@pytest.fixture
def troupe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in this process, which spares every test the start of another."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["troupe", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        code = end.value.code or 0
        assert isinstance(code, int)
        return subprocess.CompletedProcess(arguments, code, printed.out, printed.err)

    return run


@pytest.fixture
def server() -> Iterator[StreamServer]:
    made = StreamServer()
    yield made
    made.close()


@pytest.fixture
def raw_server() -> Iterator[Callable[[bytes], str]]:
    """A function that starts a server which answers every request with given bytes and closes; its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def start(answer: bytes) -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), loop)
        return f"http://127.0.0.1:{started.result(5).sockets[0].getsockname()[1]}"

    yield start
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
