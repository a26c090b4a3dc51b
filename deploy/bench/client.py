"""The measuring client: sends one streamed request to an OpenAI-compatible server and notes when its tokens come."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from ... import __version__
from ...cluster.errors import ConfigError, EngineError
from .http_pool import AnswerCut, CannotConnect, HttpPool
from .sse import EventParser
from .workload import Request

REJECTIONS = frozenset({429, 503})
"""HTTP statuses by which a server says that it is full, as opposed to broken."""
UNFINISHED = "unfinished"
MAX_ERROR_BYTES = 2000


class Outcome(msgspec.Struct, kw_only=True):
    """What became of one request. Times are seconds of `time.perf_counter`."""

    prompt_len: int
    """Tokens as planned, then as the server counted them."""
    scheduled: float
    """When it was due; latencies count from here, so that a late client or server is not flattered."""
    sent: float
    token_times: list[float] = []
    """When each event with text came."""
    finished: float = 0.0
    output_len: int = 0
    """Generated tokens: the server's usage if it tells, else the number of events with text."""
    wanted_len: int = 0
    counted_by_usage: bool = False
    cached_tokens: int = 0
    error: str | None = UNFINISHED
    """None: answered completely. Otherwise the kind of failure, such as `HTTP 500`."""
    rejected: bool = False
    detail: str = ""
    """What the server or the connection said about a failure."""


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to talk to the server."""

    url: SplitResult
    """With the path up to and with `/v1`."""
    model: str
    chat: bool = False
    headers: dict[str, str] = {}
    timeout: float = 600.0
    ignore_eos: bool = True
    include_usage: bool = True
    temperature: float = 0.0
    fields: dict[str, Any] = {}
    """Further fields of the body, as they are."""


class Delta(msgspec.Struct):
    """New text of a chat."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChunkChoice(msgspec.Struct):
    """One choice of either endpoint's chunk."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct):
    """Part of the usage."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """What the server counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class Chunk(msgspec.Struct):
    """One event of a stream; fields that do not matter here are skipped by the decoder."""

    choices: list[ChunkChoice] = []
    usage: Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(Chunk).decode


def parse_url(text: str) -> SplitResult:
    """The address of an OpenAI-compatible API; `/v1` is added if there is no path.

    Raises:
        ConfigError: not an http or https address.
    """
    try:
        url = urlsplit(text)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(
            f"URL {text!r}: write the server's address with http:// or https://, such as http://host:8000"
        )
    return url._replace(path=url.path.rstrip("/") or "/v1", query="", fragment="")


class StreamedAnswer:
    """Takes the body of one streamed answer in."""

    __slots__ = ("body", "done", "error", "finish_reason", "parser", "status", "times", "usage")

    def __init__(self) -> None:
        self.parser = EventParser()
        self.times: list[float] = []
        self.usage: Usage | None = None
        self.status = 0
        self.body = b""
        self.done = False
        self.finish_reason: str | None = None
        self.error: tuple[str, str] | None = None
        """Kind and detail of the first thing that was wrong in the stream."""

    def begin(self, status: int) -> None:
        """Status line and headers are complete."""
        self.status = status

    def feed(self, data: bytes) -> None:
        """A part of the body: events, or the text of an error."""
        now = time.perf_counter()
        if self.status != 200:
            if len(self.body) < MAX_ERROR_BYTES:
                self.body += data
            return
        try:
            for payload in self.parser.feed(data):
                if payload == b"[DONE]":
                    self.done = True
                else:
                    self._take(_decode_chunk(payload), now)
        except (msgspec.DecodeError, UnicodeDecodeError, EngineError) as error:
            self._note("malformed event", f"{error}: {data[:200]!r}")

    def _take(self, chunk: Chunk, now: float) -> None:
        if chunk.error is not None:
            self._note("error event", str(chunk.error))
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            delta = choice.delta
            if delta is not None:
                has_text = bool(delta.content or delta.reasoning_content or delta.reasoning)
            else:  # a completion's token may have no text of its own, such as half a character
                has_text = bool(choice.text) or (choice.text is not None and choice.finish_reason is None)
            if has_text:
                self.times.append(now)
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason

    def _note(self, kind: str, detail: str) -> None:
        if self.error is None:
            self.error = kind, detail


class BenchClient:
    """Sends requests as its options say. Must be used and closed within one event loop."""

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._pool = HttpPool(options.url, options.timeout)
        path = f"{options.url.path}/{'chat/completions' if options.chat else 'completions'}"
        headers = {
            "host": options.url.netloc.rpartition("@")[2],
            "user-agent": f"troupe-bench/{__version__}",
            "content-type": "application/json",
            "accept": "text/event-stream",
            **options.headers,
        }
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        self._head = "\r\n".join(lines).encode("latin-1") + b"\r\ncontent-length: "

    def encode(self, request: Request) -> bytes:
        """The whole HTTP request, so that nothing is left to do when it is due."""
        body = msgspec.json.encode(request_body(self._options, request))
        return self._head + b"%d\r\n\r\n" % len(body) + body

    async def complete(self, encoded: bytes, outcome: Outcome) -> None:
        """Send a request and fill `outcome`; failures are noted there and not raised."""
        answer = StreamedAnswer()
        outcome.token_times = answer.times
        outcome.sent = time.perf_counter()
        failure: tuple[str, str] | None = None
        try:
            await self._pool.exchange(encoded, answer)
        except CannotConnect as error:
            failure = "cannot connect", str(error)
        except AnswerCut as error:
            failure = "cut off", str(error)
        except TimeoutError:
            failure = "timed out", f"no complete answer after {self._options.timeout:g} s"
        outcome.finished = time.perf_counter()
        settle(outcome, answer, failure)

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


def request_body(options: ServerOptions, request: Request) -> dict[str, Any]:
    """The JSON body; fields beyond OpenAI's are sent only where they are wanted."""
    body: dict[str, Any] = {
        "model": options.model,
        "max_tokens": request.output_len,
        "temperature": options.temperature,
        "stream": True,
        **options.fields,
    }
    if options.chat:
        body["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        body["prompt"] = request.prompt
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.include_usage:
        body["stream_options"] = {"include_usage": True}
    return body


def settle(outcome: Outcome, answer: StreamedAnswer, failure: tuple[str, str] | None) -> None:
    """Decide what became of a request from what was received and from the failure of the connection, if any."""
    if answer.status not in (0, 200):
        failure = f"HTTP {answer.status}", error_text(answer.body)
        outcome.rejected = answer.status in REJECTIONS
    failure = failure or answer.error
    if failure is None and not (answer.done or answer.finish_reason):
        failure = "cut off", "the stream ended without a finish reason and without [DONE]"
    if failure is None and not answer.times:
        failure = "no tokens", "the stream ended without any text"
    if answer.usage is not None:
        outcome.counted_by_usage = True
        outcome.output_len = answer.usage.completion_tokens
        outcome.prompt_len = answer.usage.prompt_tokens or outcome.prompt_len
        details = answer.usage.prompt_tokens_details
        outcome.cached_tokens = (details.cached_tokens or 0) if details is not None else 0
    else:
        outcome.output_len = len(answer.times)
    outcome.error, outcome.detail = failure or (None, "")


def error_text(body: bytes) -> str:
    """The message of OpenAI's error body, or the beginning of any other body."""
    try:
        content = msgspec.json.decode(body)
        error = content.get("error", content)
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, AttributeError, KeyError):
        return " ".join(body.decode(errors="replace").split())[:300]
