"""Events go to the server without a detour, and whatever ends a stream closes its source."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from raytroupe.router.event_stream import ClientGone, EventStream, ServerSend, WhileConnected


class Numbers:
    """Gives 1, 2, … and then ends as it is told."""

    def __init__(self, last: int, end: BaseException | None = None) -> None:
        self._number, self._last, self._end = 0, last, end
        self.closed = 0

    async def __anext__(self) -> int:
        await asyncio.sleep(0)
        if self._number == self._last:
            if self._end is None:
                await asyncio.Event().wait()
            raise self._end or StopAsyncIteration
        self._number += 1
        return self._number

    async def aclose(self) -> None:
        self.closed += 1


class Digits:
    """Writes odd numbers only."""

    def event(self, update: int) -> bytes:
        return b"%d" % update if update % 2 else b""

    def closing(self) -> bytes:
        return b"end"

    def failure(self, error: Exception) -> bytes:
        return f"failed: {error}".encode()


async def run(
    numbers: Numbers, send: Callable[[dict[str, Any]], None], gone: asyncio.Event | None = None
) -> list[dict[str, Any]]:
    """Serve a stream of `numbers` through a layer that notes what passes it."""
    seen: list[dict[str, Any]] = []

    async def layer(scope: Any, receive: Any, outer: Any) -> None:
        async def noting(message: Any) -> None:
            seen.append(message)
            await outer(message)

        await EventStream(b"first", numbers, Digits())(scope, receive, noting)

    async def receive() -> dict[str, Any]:
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def server(message: Any) -> None:
        send(message)

    await ServerSend(layer)({"type": "http"}, receive, server)
    return seen


@pytest.mark.parametrize(
    ("end", "last"),
    [(StopAsyncIteration(), b"end"), (ValueError("lost"), b"failed: lost"), (OSError("no"), b"failed: no")],
)
async def test_layers_see_the_beginning_and_the_server_everything(end, last) -> None:
    numbers, sent = Numbers(4, end), []
    seen = await run(numbers, sent.append)
    assert [message["type"] for message in seen] == ["http.response.start"]
    assert sent[0] == seen[0]
    assert [message["body"] for message in sent[1:]] == [b"first", b"1", b"3", last]
    assert [message["more_body"] for message in sent[1:]] == [True, True, True, False]
    assert numbers.closed


async def test_a_client_that_leaves_closes_the_source() -> None:
    numbers, sent, gone = Numbers(2), [], asyncio.Event()
    serving = asyncio.create_task(run(numbers, sent.append, gone))
    while len(sent) < 3:  # noqa: ASYNC110 - the stream goes on by itself
        await asyncio.sleep(0)
    assert not numbers.closed
    gone.set()
    await serving
    assert numbers.closed
    assert all(message.get("more_body", True) for message in sent)


async def test_a_broken_connection_is_quiet_and_a_bug_of_the_server_is_not() -> None:
    def broken(error: Exception) -> Callable[[dict[str, Any]], None]:
        def send(message: dict[str, Any]) -> None:
            if message.get("body") == b"1":
                raise error

        return send

    numbers = Numbers(4)
    await run(numbers, broken(BrokenPipeError()))
    assert numbers.closed
    numbers = Numbers(4)
    with pytest.raises(RuntimeError, match="bug"):
        await run(numbers, broken(RuntimeError("bug")))
    assert numbers.closed


# --- while the client is there ------------------------------------------------------------------------------------


class Client:
    """Its `receive` says that it has left once it has."""

    def __init__(self, error: Exception | None = None) -> None:
        self.left = asyncio.Event()
        self._error = error

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        if self._error is not None:
            raise self._error
        return {"type": "http.disconnect"}


async def work_until_left(client: Client, clean: Callable[[], object]) -> None:
    async with WhileConnected(client.receive):
        client.left.set()
        try:
            await asyncio.Event().wait()
        finally:
            clean()


@pytest.mark.parametrize("error", [None, RuntimeError("the connection is broken")])
async def test_work_is_cancelled_when_the_client_leaves_and_the_task_goes_on(error) -> None:
    cleaned: list[bool] = []
    with pytest.raises(ClientGone):
        await work_until_left(Client(error), lambda: cleaned.append(True))
    assert cleaned
    await asyncio.sleep(0)
    assert not asyncio.current_task().cancelling()


async def test_work_that_ends_first_is_not_disturbed_by_a_client_that_leaves_later() -> None:
    client = Client()
    async with WhileConnected(client.receive):
        result = await asyncio.sleep(0, "done")
    client.left.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert result == "done"


async def test_errors_of_the_work_stay_what_they_are() -> None:
    client = Client()
    with pytest.raises(ValueError, match="wrong"):
        async with WhileConnected(client.receive):
            raise ValueError("wrong")
    with pytest.raises(KeyError, match="in the cleaning"):
        await work_until_left(client, lambda: {}["in the cleaning"])
    await asyncio.sleep(0)
    assert not asyncio.current_task().cancelling()


@pytest.mark.parametrize("leaves", [False, True])
async def test_who_cancels_the_task_gets_a_cancelled_task_whether_the_client_leaves_or_not(leaves) -> None:
    client, began = Client(), asyncio.Event()

    async def serve() -> None:
        async with WhileConnected(client.receive):
            began.set()
            await asyncio.Event().wait()

    serving = asyncio.create_task(serve())
    await began.wait()
    await asyncio.sleep(0)
    if leaves:
        client.left.set()
    serving.cancel()
    await asyncio.wait([serving])
    assert serving.cancelled()
