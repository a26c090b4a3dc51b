"""Tokens arrive over real ZeroMQ sockets, only from senders with the right keys."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils.monitor import recv_monitor_message

from raytroupe.cluster.messages import Endpoint, TokenBatch
from raytroupe.cluster.request import FinishReason, TokenLogprobs, TokenOutput
from raytroupe.cluster.secure_socket import SecureContext
from raytroupe.router.token_receiver import Mailbox, TokenReceiver, TokensMissing


@pytest.fixture
async def receiver():
    receiver = TokenReceiver("127.0.0.1")
    receiver.start()
    yield receiver
    receiver.close()


@pytest.fixture
def context():
    with SecureContext() as context:
        yield context


def batch(*outputs: TokenOutput) -> bytes:
    return msgspec.msgpack.encode(TokenBatch(list(outputs)))


async def drain(mailbox: Mailbox) -> TokenOutput:
    """Everything up to the finish reason, as one output."""
    output = await mailbox.get()
    while output.finish_reason is None:
        output.absorb(await mailbox.get())
    return output


async def test_outputs_reach_their_requests_in_order(receiver, context) -> None:
    sender = context.connect(zmq.PUSH, receiver.endpoint)
    with receiver.open("a") as a, receiver.open("b") as b:
        sender.send(batch(TokenOutput("a", [1], cached_tokens=5), TokenOutput("b", [7]), TokenOutput("unknown", [9])))
        sender.send(b"not a batch")
        sender.send(batch(TokenOutput("b", [8], FinishReason.STOP, 8, index=1)))
        sender.send(batch(TokenOutput("a", [2, 3], FinishReason.LENGTH, index=1)))
        assert await drain(a) == TokenOutput("a", [1, 2, 3], FinishReason.LENGTH, None, None, 5)
        assert await drain(b) == TokenOutput("b", [7, 8], FinishReason.STOP, 8)


async def test_a_reader_that_sleeps_gets_all_in_one(receiver, context) -> None:
    sender = context.connect(zmq.PUSH, receiver.endpoint)
    with receiver.open("slow") as slow, receiver.open("last") as last:
        for step in range(1000):
            sender.send(batch(TokenOutput("slow", [step], logprobs=[TokenLogprobs(-float(step), [])], index=step)))
        sender.send(batch(TokenOutput("last", [])))
        await last.get()
        output = await slow.get()
    assert output.tokens == list(range(1000))
    assert [logprobs.chosen for logprobs in output.logprobs] == [-float(step) for step in range(1000)]


async def test_a_sender_without_the_right_keys_is_refused(receiver, context) -> None:
    stranger_public, stranger_secret = map(bytes.decode, zmq.curve_keypair())
    endpoint = receiver.endpoint
    unknown_client = msgspec.structs.replace(
        endpoint, client_public_key=stranger_public, client_secret_key=stranger_secret
    )
    wrong_server = msgspec.structs.replace(endpoint, server_public_key=stranger_public)
    with receiver.open("a") as mailbox:
        for bad, event in (
            (unknown_client, zmq.EVENT_HANDSHAKE_FAILED_AUTH),
            (wrong_server, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL),
        ):
            await refused(context, bad, event)
        context.connect(zmq.PUSH, endpoint).send(batch(TokenOutput("a", [2])))
        assert await mailbox.get() == TokenOutput("a", [2])


async def refused(context: SecureContext, endpoint: Endpoint, event: int) -> None:
    """Try to send a token for request "a"; returns when the receiver has refused the connection."""
    # To see the handshake, the monitor has to be there before it: connect to nobody first.
    sender = context.connect(zmq.PUSH, msgspec.structs.replace(endpoint, address="inproc://nobody"))
    monitor = sender.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
    sender.connect(endpoint.address)
    sender.send(batch(TokenOutput("a", [1])))
    # While this process waits in a thread, the receiver answers in its own.
    found = await asyncio.to_thread(recv_monitor_message, monitor)
    assert found["event"] in (event, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
    sender.disable_monitor()
    sender.close(linger=0)


async def test_messages_that_came_before_reading_began_are_not_lost(context) -> None:
    receiver = TokenReceiver("127.0.0.1")
    with receiver.open("a") as mailbox:
        sender = context.connect(zmq.PUSH, receiver.endpoint)
        for token in range(600):  # more than are taken in one go
            sender.send(batch(TokenOutput("a", [token], index=token)))
        receiver.start()
        tokens: list[int] = []
        while len(tokens) < 600:
            tokens += (await mailbox.get()).tokens
    receiver.close()
    assert tokens == list(range(600))


async def test_a_closed_mailbox_gives_what_it_has_then_says_why_there_is_no_more() -> None:
    mailbox = Mailbox()
    mailbox.put(TokenOutput("a", [1]))
    mailbox.close()
    assert (await mailbox.get()).tokens == [1]
    assert await mailbox.get() is None
    mailbox.close(ValueError("lost"))
    with pytest.raises(ValueError, match="lost"):
        await mailbox.get()


def output(first: int, last: int) -> TokenOutput:
    """Tokens number `first` to `last`; a token is its own number."""
    numbers = range(first, last + 1)
    return TokenOutput("a", list(numbers), logprobs=[TokenLogprobs(-float(n), []) for n in numbers], index=first)


@pytest.mark.parametrize("look", [False, True])
async def test_tokens_that_come_twice_are_left_out(look) -> None:
    mailbox, tokens, chances = Mailbox(first_index=3), [], []
    for arrived in (output(3, 4), output(3, 4), output(1, 2), output(4, 6), output(7, 7)):
        mailbox.put(arrived)
        if (look and arrived.tokens) or arrived.index == 7:
            taken = await mailbox.get()
            tokens += taken.tokens
            chances += [-chance.chosen for chance in taken.logprobs]
    assert tokens == chances == [3, 4, 5, 6, 7]


async def test_after_a_gap_the_reader_gets_what_came_before_it_and_then_an_error() -> None:
    mailbox = Mailbox(first_index=3)
    for arrived in (output(3, 4), output(6, 6), output(7, 7)):
        mailbox.put(arrived)
    assert (await mailbox.get()).tokens == [3, 4]
    with pytest.raises(TokensMissing, match="token 6 came when token 5 was due"):
        await mailbox.get()


async def test_closing_wakes_a_waiting_reader() -> None:
    mailbox = Mailbox()
    waiting = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    mailbox.close(ValueError("lost"))
    with pytest.raises(ValueError, match="lost"):
        await waiting


steps = st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.booleans()), min_size=1, max_size=8)


@given(steps, st.booleans())
async def test_nothing_is_lost_however_often_the_reader_looks(steps, logprobs) -> None:
    mailbox, seen, sent = Mailbox(), [], 0
    for index, (tokens, look) in enumerate(steps):
        last = index == len(steps) - 1
        chances = [TokenLogprobs(-float(token), []) for token in tokens] if logprobs else None
        reason, stop_token = (FinishReason.STOP, 9) if last else (None, None)
        mailbox.put(TokenOutput("a", list(tokens), reason, stop_token, chances, index=sent))
        sent += len(tokens)
        if look or last:
            seen.append(await mailbox.get())
    expected = [token for tokens, _ in steps for token in tokens]
    assert [token for output in seen for token in output.tokens] == expected
    if logprobs:
        assert [-chance.chosen for output in seen for chance in output.logprobs] == expected
    assert [output.finish_reason for output in seen] == [None] * (len(seen) - 1) + [FinishReason.STOP]
    assert seen[-1].stop_token == 9


def test_listening_everywhere_is_refused() -> None:
    with pytest.raises(ValueError, match="all interfaces"):
        TokenReceiver("0.0.0.0")
