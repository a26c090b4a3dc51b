"""A client that goes away stops its request in the engine, whatever it was waiting for."""

from __future__ import annotations

import asyncio

import httpx
import pytest

BODY = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}


async def running(engine, count: int) -> None:
    """Wait until the engine has begun `count` more requests."""
    for _ in range(count):
        await engine.began.get()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("hold_after", [0, 2])
async def test_closing_the_connection_aborts(address, engine, stream, n, hold_after) -> None:
    engine.hold_after = hold_after
    async with httpx.AsyncClient(base_url=address) as client:
        request = client.build_request("POST", "/v1/chat/completions", json=BODY | {"stream": stream, "n": n})
        asking = asyncio.create_task(client.send(request, stream=True))
        await running(engine, n)
        if stream and hold_after:
            response = await asking
            first = await anext(response.aiter_lines())
            assert first.startswith("data: ")
            await response.aclose()
        else:
            asking.cancel()
    await asyncio.wait_for(engine.idle.wait(), 30)
    engine.hold_after = None
    async with httpx.AsyncClient(base_url=address) as client:
        assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200


async def test_leaving_in_the_middle_of_the_body_is_quiet(address, engine, caplog) -> None:
    host, port = address.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with httpx.AsyncClient(base_url=address) as client:
        assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200
    assert len(engine.requests) == 1
    assert [record for record in caplog.records if record.name != "httpx"] == []  # that is the client's own


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("turns", range(16))
async def test_a_cancelled_server_task_aborts_at_any_moment(app, engine, stream, n, turns) -> None:
    """Ray Serve cancels the task of a request when its proxy says that the client is gone."""
    engine.hold_after = 1
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://troupe") as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=BODY | {"stream": stream, "n": n}))
        await running(engine, n)
        for _ in range(turns):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert not engine.running


async def test_a_slow_reader_gets_what_piled_up_in_one_event(app, engine) -> None:
    """Events are made when they are asked for: the client of the engine may merge what waits."""
    engine.tokens_per_output = 4
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://troupe") as client:
        response = await client.post("/v1/chat/completions", json=BODY | {"stream": True})
    contents = response.text.count('"content":"')
    assert contents == 1 + -(-len(engine.tokens("Paris is nice.")) // 4)
