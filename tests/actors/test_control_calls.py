"""A control call lasts as long as its request, and its request no longer than the call or the ingress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
import zmq
from simulated_shard import SimulatedShard, generate

from raytroupe.actors.control_calls import ControlCalls
from raytroupe.actors.engine_loop import EngineLoop
from raytroupe.actors.executor import LocalExecutor
from raytroupe.actors.ingress_connection import RECONNECT_SECONDS
from raytroupe.actors.repetition import repeat
from raytroupe.actors.token_sender import TokenSender
from raytroupe.cluster.errors import ShardFailed
from raytroupe.cluster.latency_class import LatencyTargets
from raytroupe.cluster.messages import Endpoint, GenerateCall, GenerateReply, TokenBatch
from raytroupe.cluster.request import EngineRequest, SamplingParams
from raytroupe.cluster.scheduler import Scheduler
from raytroupe.cluster.scheduler_config import SchedulerConfig
from raytroupe.cluster.secure_socket import SecureContext

LIMITS = SchedulerConfig(
    num_blocks=101, block_size=4, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=32, max_num_waiting=2
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Replica:
    """A scheduler with a simulated shard; the engine runs only when a test starts it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.scheduler = Scheduler(LIMITS)
        self.sender = TokenSender(self.clock)
        shard = SimulatedShard(LIMITS.num_blocks, LIMITS.block_size, LIMITS.max_num_seqs, self_feeding=True)
        self.executor = LocalExecutor(shard.run)
        self.engine = EngineLoop(self.scheduler, self.executor, lambda outputs: self.calls.publish(outputs))
        self.calls = ControlCalls(self.engine, self.sender)


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    replica = Replica()
    yield replica
    replica.executor.close()
    replica.sender.close()


@pytest.fixture
def ingress() -> Iterator[tuple[SecureContext, zmq.Socket, Endpoint]]:
    with SecureContext() as context:
        yield context, *context.bind(zmq.PULL, "127.0.0.1")


def call(endpoint: Endpoint, name: str = "a", **fields) -> GenerateCall:
    sampling = SamplingParams(max_tokens=8)
    return GenerateCall(EngineRequest(request_id=name, prompt=[1, 2, 3], sampling=sampling, **fields), endpoint)


def receive(socket: zmq.Socket) -> list:
    assert socket.poll(10_000), "no message within 10 s"
    return msgspec.msgpack.decode(socket.recv(), type=TokenBatch).outputs


async def test_acceptance_comes_first_then_numbered_tokens_and_the_reply(replica, ingress) -> None:
    _, socket, endpoint = ingress
    answer = generate([1, 2, 3], 8, frozenset(), LIMITS.max_model_len)
    serving = asyncio.create_task(replica.calls.serve(call(endpoint, generated=answer[:2])))
    await asyncio.sleep(0)
    (accepted,) = await asyncio.to_thread(receive, socket)
    assert (accepted.tokens, accepted.finish_reason, accepted.index) == ([], None, 2)
    running = asyncio.create_task(replica.engine.run())
    assert await serving == GenerateReply()
    outputs = [output for _ in answer[2:] for output in receive(socket)]
    assert [token for output in outputs for token in output.tokens] == answer[2:]
    assert [output.index for output in outputs] == [2, 3, 4, 5, 6, 7]
    running.cancel()


async def test_cancelling_a_call_aborts_its_request(replica, ingress) -> None:
    serving = asyncio.create_task(replica.calls.serve(call(ingress[2])))
    await asyncio.sleep(0)
    assert replica.scheduler.has_work
    serving.cancel()
    await asyncio.wait([serving])
    assert not replica.scheduler.has_work


async def test_a_call_with_an_impossible_address_leaves_no_request_behind(replica, ingress) -> None:
    with pytest.raises(zmq.ZMQError):
        await replica.calls.serve(call(msgspec.structs.replace(ingress[2], address="nowhere")))
    assert not replica.scheduler.has_work
    assert replica.calls._ended == {}


async def test_a_refused_request_does_not_disturb_the_one_with_its_name(replica, ingress) -> None:
    serving = asyncio.create_task(replica.calls.serve(call(ingress[2])))
    await asyncio.sleep(0)
    reply = await replica.calls.serve(call(ingress[2]))
    assert reply.error_kind == "InvalidRequest"
    running = asyncio.create_task(replica.engine.run())
    assert await serving == GenerateReply()
    running.cancel()


async def test_a_request_that_waits_in_vain_ends_with_the_reason(replica, ingress) -> None:
    late = LatencyTargets(name="explicit", ttft=0.0, refuse_late=True)
    serving = asyncio.create_task(replica.calls.serve(call(ingress[2], latency=late)))
    await asyncio.sleep(0.001)
    running = asyncio.create_task(replica.engine.run())
    reply = await serving
    assert (reply.error_kind, reply.retry_after) == ("TargetUnreachable", 1)
    assert "cannot come within 0 s" in reply.error
    assert not replica.scheduler.has_work
    running.cancel()


async def test_the_engine_measures_its_steps(replica, ingress) -> None:
    running = asyncio.create_task(replica.engine.run())
    for name in "abc":
        assert await replica.calls.serve(call(ingress[2], name)) == GenerateReply()
    curve = replica.scheduler.load().curve
    assert curve is not None
    assert 0 < curve.seconds(3, 1) < 10
    running.cancel()


async def test_requests_of_a_dead_ingress_are_aborted(replica, ingress) -> None:
    context, _, endpoint = ingress
    serving = asyncio.create_task(replica.calls.serve(call(endpoint)))
    await asyncio.sleep(0)
    outlet = replica.sender._outlets[endpoint]
    for dead in (False, True):
        if dead:
            context.close()
        for _ in range(1000):
            replica.calls.abort_orphans()
            if (outlet.dead_at is not None) is dead:
                break
            await asyncio.sleep(0.01)
    assert replica.scheduler.has_work
    replica.clock.now += RECONNECT_SECONDS + 0.01
    replica.calls.abort_orphans()
    assert not replica.scheduler.has_work
    assert (await serving).error_kind == "ReplicaUnavailable"


async def test_a_failure_ends_all_calls_and_refuses_later_ones(replica, ingress) -> None:
    serving = [asyncio.create_task(replica.calls.serve(call(ingress[2], name))) for name in "ab"]
    await asyncio.sleep(0)
    replica.calls.fail(ShardFailed("shard 1 died"))
    replies = [*await asyncio.gather(*serving), await replica.calls.serve(call(ingress[2], "c"))]
    assert replies == [GenerateReply("shard 1 died", "ShardFailed")] * 3


async def test_repeated_work_goes_on_after_a_failure_that_is_logged_once(caplog) -> None:
    calls = []

    def work() -> None:
        calls.append(len(calls))
        if len(calls) < 4:
            raise ValueError("no room")

    repeating = asyncio.create_task(repeat(work, 0.001))
    with caplog.at_level("ERROR", logger="ray.serve"):
        while len(calls) < 6:  # noqa: ASYNC110 - the work under test counts
            await asyncio.sleep(0.001)
    assert not repeating.done()
    repeating.cancel()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
