"""Tokens on their way from a scheduler to the ingresses, over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from raytroupe.actors.ingress_connection import CONNECT_SECONDS, RECONNECT_SECONDS
from raytroupe.actors.token_sender import KEEP_SECONDS, TokenSender
from raytroupe.cluster.messages import Endpoint, TokenBatch
from raytroupe.cluster.request import FinishReason, TokenLogprobs, TokenOutput
from raytroupe.cluster.secure_socket import SecureContext


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def context() -> Iterator[SecureContext]:
    with SecureContext() as context:
        yield context


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sender(clock: Clock) -> Iterator[TokenSender]:
    sender = TokenSender(clock)
    yield sender
    sender.close()


def receive(socket: zmq.Socket) -> list[TokenOutput]:
    assert socket.poll(10_000), "no message within 10 s"
    return msgspec.msgpack.decode(socket.recv(), type=TokenBatch).outputs


def test_one_message_per_step_and_ingress(context: SecureContext, sender: TokenSender) -> None:
    one, one_endpoint = context.bind(zmq.PULL, "127.0.0.1")
    two, two_endpoint = context.bind(zmq.PULL, "127.0.0.1")
    sender.register("a", one_endpoint)
    sender.register("b", two_endpoint)
    sender.register("c", one_endpoint)
    first = [
        TokenOutput("a", [5], logprobs=[TokenLogprobs(-0.5, [(5, -0.5), (6, -1.5)])], cached_tokens=16),
        TokenOutput("b", [6]),
        TokenOutput("c", [7], FinishReason.STOP, stop_token=7),
    ]
    second = [TokenOutput("b", [8])]
    sender.publish(first)
    sender.publish(second)
    assert receive(one) == [first[0], first[2]]
    assert receive(two) == [first[1]]
    assert receive(two) == second
    assert not one.poll(100), "an ingress without outputs in a step gets no message"


def test_outputs_of_unknown_requests_are_dropped(context: SecureContext, sender: TokenSender) -> None:
    socket, endpoint = context.bind(zmq.PULL, "127.0.0.1")
    sender.register("a", endpoint)
    sender.register("b", endpoint)
    sender.unregister("a")
    sender.publish([TokenOutput("a", [1]), TokenOutput("stranger", [2]), TokenOutput("b", [3])])
    assert receive(socket) == [TokenOutput("b", [3])]


def test_a_reader_that_reads_nothing_delays_nobody(context: SecureContext, sender: TokenSender) -> None:
    slow, slow_endpoint = context.bind(zmq.PULL, "127.0.0.1")
    quick, quick_endpoint = context.bind(zmq.PULL, "127.0.0.1")
    sender.register("slow", slow_endpoint)
    sender.register("quick", quick_endpoint)
    for step in range(20_000):  # more than the sockets' buffers and default high-water marks hold
        sender.publish([TokenOutput("slow", [step])])
    sender.publish([TokenOutput("quick", [1])])
    assert receive(quick) == [TokenOutput("quick", [1])]
    assert [receive(slow)[0].tokens[0] for _ in range(20_000)] == list(range(20_000)), "nothing is lost or reordered"


def test_connections_are_shared_and_closed_when_unused(
    context: SecureContext, sender: TokenSender, clock: Clock
) -> None:
    endpoints = [context.bind(zmq.PULL, "127.0.0.1")[1] for _ in range(3)]
    sender.register("a", endpoints[0])
    sender.register("b", endpoints[0])
    sender.register("c", endpoints[1])
    assert sender.num_connections == 2
    sender.unregister("a")
    sender.unregister("c")
    clock.now += KEEP_SECONDS
    sender.register("d", endpoints[2])
    assert sender.num_connections == 2, "the idle one is closed, the one that still serves request b is not"


def test_a_dead_ingress_does_not_stop_the_others(sender: TokenSender) -> None:
    with SecureContext() as doomed:
        _, gone = doomed.bind(zmq.PULL, "127.0.0.1")
        sender.register("a", gone)
        sender.publish([TokenOutput("a", [1])])
    with SecureContext() as context:
        socket, endpoint = context.bind(zmq.PULL, "127.0.0.1")
        sender.register("b", endpoint)
        for step in range(100):
            sender.publish([TokenOutput("a", [step]), TokenOutput("b", [step])])
        assert [receive(socket)[0].tokens for _ in range(100)] == [[step] for step in range(100)]


def wait_for(sender: TokenSender, endpoint: Endpoint, *, connected: bool) -> None:
    """Until the sender has noticed that the connection is there, or is not."""
    outlet = sender._outlets[endpoint]
    for _ in range(1000):
        assert sender.drop_unreachable() == []
        if (outlet.dead_at is None) is connected:
            return
        time.sleep(0.01)
    pytest.fail(f"not {'connected' if connected else 'disconnected'} within 10 s")


def test_the_requests_of_an_ingress_that_is_gone_are_named_once(sender: TokenSender, clock: Clock) -> None:
    with SecureContext() as context, SecureContext() as doomed:
        alive, alive_endpoint = context.bind(zmq.PULL, "127.0.0.1")
        _, gone_endpoint = doomed.bind(zmq.PULL, "127.0.0.1")
        sender.register("a", gone_endpoint)
        sender.register("b", alive_endpoint)
        sender.register("c", gone_endpoint)
        wait_for(sender, alive_endpoint, connected=True)
        wait_for(sender, gone_endpoint, connected=True)
        clock.now += 1000
        assert sender.drop_unreachable() == []
        doomed.close()
        wait_for(sender, gone_endpoint, connected=False)
        clock.now += RECONNECT_SECONDS - 0.01
        assert sender.drop_unreachable() == []
        clock.now += 0.02
        assert sender.drop_unreachable() == ["a", "c"]
        assert sender.drop_unreachable() == []
        assert sender.num_connections == 1
        sender.unregister("a")
        sender.publish([TokenOutput("a", [1]), TokenOutput("b", [2])])
        assert receive(alive) == [TokenOutput("b", [2])]


def test_a_connection_that_comes_back_loses_no_request(
    context: SecureContext, sender: TokenSender, clock: Clock
) -> None:
    public, secret = zmq.curve_keypair()

    def listen(address: str) -> zmq.Socket:
        socket = zmq.Context.instance().socket(zmq.PULL)
        socket.curve_server, socket.curve_publickey, socket.curve_secretkey = True, public, secret
        socket.bind(address)
        return socket

    first = listen("tcp://127.0.0.1:*")
    address = first.last_endpoint.decode()
    client_public, client_secret = zmq.curve_keypair()
    endpoint = Endpoint(address, public.decode(), client_public.decode(), client_secret.decode())
    sender.register("a", endpoint)
    wait_for(sender, endpoint, connected=True)
    first.close(linger=0)
    wait_for(sender, endpoint, connected=False)
    clock.now += RECONNECT_SECONDS - 0.01
    second = listen(address)
    wait_for(sender, endpoint, connected=True)
    clock.now += 1000
    assert sender.drop_unreachable() == []
    sender.publish([TokenOutput("a", [1])])
    assert receive(second) == [TokenOutput("a", [1])]
    second.close(linger=0)


def test_an_ingress_that_never_answers_is_given_up(sender: TokenSender, clock: Clock) -> None:
    with SecureContext() as doomed:
        _, endpoint = doomed.bind(zmq.PULL, "127.0.0.1")
    sender.register("a", endpoint)
    clock.now += CONNECT_SECONDS - 0.01
    assert sender.drop_unreachable() == []
    clock.now += 0.02
    assert sender.drop_unreachable() == ["a"]


async def receive_soon(socket: zmq.Socket) -> list[TokenOutput]:
    """Like `receive`, but timers go on meanwhile."""
    for _ in range(1000):
        if socket.poll(0):
            return receive(socket)
        await asyncio.sleep(0.01)
    raise AssertionError("no message within 10 s")


@pytest.fixture
def paced(clock: Clock) -> Iterator[TokenSender]:
    sender = TokenSender(clock, interval_s=0.2)
    yield sender
    sender.close()


async def test_steps_within_the_interval_share_a_message(context: SecureContext, paced: TokenSender) -> None:
    socket, endpoint = context.bind(zmq.PULL, "127.0.0.1")
    paced.register("a", endpoint)
    paced.publish([TokenOutput("a", [1], index=0)])
    assert await receive_soon(socket) == [TokenOutput("a", [1], index=0)], "a first token does not wait"
    for token in range(1, 4):
        paced.publish([TokenOutput("a", [token], index=token)])
    assert not socket.poll(50)
    assert await receive_soon(socket) == [TokenOutput("a", [1, 2, 3], index=1)]


async def test_few_outputs_do_not_wait(context: SecureContext, clock: Clock) -> None:
    socket, endpoint = context.bind(zmq.PULL, "127.0.0.1")
    sender = TokenSender(clock, interval_s=60.0, few_outputs=3)
    for name in "abc":
        sender.register(name, endpoint)
    two = [TokenOutput(name, [1], index=1) for name in "ab"]
    sender.publish(two)
    assert receive(socket) == two
    three = [TokenOutput(name, [2], index=2) for name in "abc"]
    sender.publish(three)
    assert not socket.poll(50)
    sender.close()


async def test_after_the_interval_a_step_sends_at_once(
    context: SecureContext, paced: TokenSender, clock: Clock
) -> None:
    socket, endpoint = context.bind(zmq.PULL, "127.0.0.1")
    paced.register("a", endpoint)
    paced.publish([TokenOutput("a", [0], index=0)])
    paced.publish([TokenOutput("a", [1], index=1)])
    clock.now += 0.2
    paced.publish([TokenOutput("a", [2], index=2)])
    assert [output.tokens for output in receive(socket)] == [[0]]
    assert [output.tokens for output in receive(socket)] == [[1, 2]]
    await asyncio.sleep(0.3)
    assert not socket.poll(50), "the timer has nothing left to do"


@pytest.mark.parametrize(
    "urgent",
    [
        TokenOutput("b", [], index=5),
        TokenOutput("b", [7], index=0),
        TokenOutput("b", [7], FinishReason.STOP, 7, index=9),
    ],
    ids=["accepted", "first", "last"],
)
async def test_what_is_urgent_takes_along_what_waits(
    context: SecureContext, paced: TokenSender, urgent: TokenOutput
) -> None:
    socket, endpoint = context.bind(zmq.PULL, "127.0.0.1")
    other, other_endpoint = context.bind(zmq.PULL, "127.0.0.1")
    for request_id, ingress in (("a", endpoint), ("b", endpoint), ("c", other_endpoint)):
        paced.register(request_id, ingress)
    paced.publish([TokenOutput("a", [0], index=0), TokenOutput("c", [0], index=0)])
    paced.publish([TokenOutput("a", [1], index=1), TokenOutput("c", [1], index=1)])
    paced.publish([urgent])
    assert [output.tokens for output in receive(socket)] == [[0]]
    assert receive(socket) == [TokenOutput("a", [1], index=1), urgent]
    assert [output.tokens for output in receive(other)] == [[0]]
    assert not other.poll(50), "another ingress is not concerned"


async def test_patient_requests_wait_longer_and_each_at_its_own_time(context: SecureContext, clock: Clock) -> None:
    socket, endpoint = context.bind(zmq.PULL, "127.0.0.1")
    sender = TokenSender(clock, patient_s=0.2)
    for name in "ab":
        sender.register(name, endpoint, patient=True)
    sender.register("steady", endpoint)

    def step(number: int, *names: str) -> list[TokenOutput]:
        sender.publish([TokenOutput(name, [number], index=number) for name in names])
        return receive(socket) if socket.poll(50) else []

    assert [output.request_id for output in step(0, "a", "steady")] == ["a", "steady"], "a first token does not wait"
    assert [output.request_id for output in step(1, "a", "steady")] == ["steady", "a"], "the lane's first message"
    clock.now += 0.1
    assert step(0, "b") == [TokenOutput("b", [0], index=0)]
    assert [output.request_id for output in step(1, "b")] == ["b"]
    for number in (2, 3):
        assert step(number, "a", "b", "steady") == [TokenOutput("steady", [number], index=number)]
    clock.now += 0.11
    assert step(4, "a", "b") == [TokenOutput("a", [2, 3, 4], index=2)]
    sender.publish([TokenOutput("b", [5], FinishReason.LENGTH, index=5)])
    assert receive(socket) == [TokenOutput("b", [2, 3, 4, 5], FinishReason.LENGTH, index=2)], "nor does the last one"
    sender.close()


async def test_what_a_preempted_request_left_waiting_is_sent_in_time(context: SecureContext, clock: Clock) -> None:
    socket, endpoint = context.bind(zmq.PULL, "127.0.0.1")
    sender = TokenSender(clock, patient_s=0.2)
    sender.register("a", endpoint, patient=True)
    for number in range(3):
        sender.publish([TokenOutput("a", [number], index=number)])
    assert [receive(socket)[0].tokens for _ in range(2)] == [[0], [1]]
    assert await receive_soon(socket) == [TokenOutput("a", [2], index=2)]
    sender.close()


async def test_what_waits_is_sent_when_the_sender_closes(context: SecureContext, clock: Clock) -> None:
    socket, endpoint = context.bind(zmq.PULL, "127.0.0.1")
    sender = TokenSender(clock, interval_s=60.0)
    sender.register("a", endpoint)
    sender.publish([TokenOutput("a", [0], index=0)])
    sender.publish([TokenOutput("a", [1], index=1)])
    sender.close()
    assert [output.tokens for output in receive(socket) + receive(socket)] == [[0], [1]]


async def test_an_ingress_that_is_gone_has_no_timer_left(context: SecureContext, clock: Clock) -> None:
    socket, endpoint = context.bind(zmq.PULL, "127.0.0.1")
    socket.close(0)
    sender = TokenSender(clock, interval_s=0.05)
    sender.register("a", endpoint)
    sender.publish([TokenOutput("a", [0], index=0)])
    sender.publish([TokenOutput("a", [1], index=1)])
    clock.now += CONNECT_SECONDS
    assert sender.drop_unreachable() == ["a"]
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    await asyncio.sleep(0.1)
    assert not faults
    sender.close()
