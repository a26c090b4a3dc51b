"""The channel between scheduler and shards, with real sockets and shards in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
import zmq

from raytroupe.actors.channel import ChannelExecutor, ShardServer
from raytroupe.cluster.errors import ShardFailed, StepFailed
from raytroupe.cluster.messages import Endpoint
from raytroupe.cluster.request import SamplingParams
from raytroupe.cluster.secure_socket import SecureContext
from raytroupe.cluster.step import NewSequence, StepPlan, StepResult

LOOPBACK = "127.0.0.1"


def plan_of(step: int) -> StepPlan:
    new = NewSequence(0, [step, step + 1], 2, SamplingParams(logit_bias={7: 1.5}, stop_token_ids=(2,)))
    return StepPlan(step, [new], [0], [0], [2], [True], 0, [(0, [1, 2])], [])


def result_of(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, [sum(plan.new[0].tokens)], None, 0.5, 1.0)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nothing happened within 10 s")


class Shards:
    """Shard servers in threads; what each received and how each ended."""

    def __init__(self) -> None:
        self.plans: dict[int, list[StepPlan]] = {}
        self.errors: dict[int, ShardFailed] = {}
        self._threads: list[threading.Thread] = []

    def start(self, endpoint: Endpoint, rank: int, run: Callable[[StepPlan], StepResult | None]) -> None:
        self.plans[rank] = []

        def record(plan: StepPlan) -> StepResult | None:
            self.plans[rank].append(plan)
            return run(plan)

        def serve() -> None:
            try:
                ShardServer(endpoint, rank, "n1").serve(record)
            except ShardFailed as error:
                self.errors[rank] = error

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self._threads.append(thread)

    async def ended(self) -> bool:
        for thread in self._threads:
            await asyncio.to_thread(thread.join, 10)
        return not any(thread.is_alive() for thread in self._threads)


@pytest.fixture
async def executor() -> AsyncIterator[ChannelExecutor]:
    executor = ChannelExecutor(LOOPBACK, num_shards=2)
    yield executor
    executor.close()


async def test_results_come_from_the_output_shard_in_the_order_of_the_plans(executor: ChannelExecutor) -> None:
    shards = Shards()
    shards.start(executor.endpoint, 0, result_of)
    shards.start(executor.endpoint, 1, lambda plan: None)
    await executor.connected(10)
    plans = [plan_of(step) for step in range(200)]
    for plan in plans:
        executor.submit(plan)
    assert [await executor.result() for _ in plans] == [result_of(plan) for plan in plans]
    executor.close()
    assert await shards.ended()
    assert shards.plans == {0: plans, 1: plans}, "every shard sees every plan, unchanged and in order"
    assert not shards.errors


async def test_a_step_in_which_a_shard_raises_ends_as_shard_failed(executor: ChannelExecutor) -> None:
    def explode(plan: StepPlan) -> StepResult | None:
        raise ValueError(f"no memory in step {plan.step}")

    shards = Shards()
    shards.start(executor.endpoint, 0, lambda plan: None)
    shards.start(executor.endpoint, 1, explode)
    await executor.connected(10)
    executor.submit(plan_of(3))
    with pytest.raises(StepFailed, match=r"shard 1 on node n1 failed in step 3: ValueError: no memory in step 3"):
        await executor.result()
    with pytest.raises(ShardFailed):
        executor.submit(plan_of(4))
    executor.close()
    assert await shards.ended()
    assert shards.errors.keys() == {1}


async def test_failure_reported_from_outside_wakes_whoever_waits(executor: ChannelExecutor) -> None:
    waiting = asyncio.create_task(executor.result())
    await asyncio.sleep(0)
    executor.fail(ShardFailed("shard 1 on node n1 died"))
    executor.fail(ShardFailed("a later failure that the first one caused"))
    with pytest.raises(ShardFailed, match="shard 1 on node n1 died"):
        await waiting


async def test_a_process_that_died_is_blamed_rather_than_the_peers_it_took_along(executor: ChannelExecutor) -> None:
    def lose_peer(plan: StepPlan) -> StepResult | None:
        raise RuntimeError("connection closed by peer")

    shards = Shards()
    shards.start(executor.endpoint, 0, lose_peer)
    shards.start(executor.endpoint, 1, lambda plan: None)
    await executor.connected(10)
    executor.submit(plan_of(0))
    await until(lambda: executor._suspicion is not None)
    executor.submit(plan_of(1))  # not refused: what happened is not known yet
    executor.fail(ShardFailed("the process of shard 1 ended"))
    with pytest.raises(ShardFailed, match="the process of shard 1 ended"):
        await executor.result()


async def test_a_plan_for_a_shard_that_left_is_a_failure(executor: ChannelExecutor) -> None:
    shards = Shards()
    shards.start(executor.endpoint, 0, result_of)
    await until(lambda: len(executor._missing) == 1)
    executor.submit(plan_of(0))
    with pytest.raises(ShardFailed, match="shard 1 is not connected any more"):
        await _all_results(executor)


async def _all_results(executor: ChannelExecutor) -> None:
    while True:
        await executor.result()


async def test_a_shard_that_missed_a_plan_refuses_the_next(executor: ChannelExecutor) -> None:
    shards = Shards()
    shards.start(executor.endpoint, 0, result_of)
    shards.start(executor.endpoint, 1, lambda plan: None)
    await executor.connected(10)
    executor.submit(plan_of(4))
    assert (await executor.result()).step == 4
    executor.submit(plan_of(6))
    with pytest.raises(ShardFailed, match=r"shard \d on node n1 got step 6 instead of 5: plans were lost"):
        await executor.result()
    executor.close()
    assert await shards.ended()
    assert shards.errors.keys() == {0, 1}
    assert [plan.step for plan in shards.plans[0]] == [4]


async def test_results_that_arrived_before_a_failure_are_still_delivered(executor: ChannelExecutor) -> None:
    shards = Shards()
    shards.start(executor.endpoint, 0, result_of)
    shards.start(executor.endpoint, 1, lambda plan: None)
    await executor.connected(10)
    executor.submit(plan_of(0))
    await until(lambda: bool(executor._results))
    executor.fail(ShardFailed("gone"))
    assert (await executor.result()).step == 0
    with pytest.raises(ShardFailed, match="gone"):
        await executor.result()


async def test_a_shard_that_never_connects_is_named(executor: ChannelExecutor) -> None:
    shards = Shards()
    shards.start(executor.endpoint, 0, result_of)
    await until(lambda: len(executor._missing) == 1)
    with pytest.raises(ShardFailed, match=r"^rank-1 did not connect to the scheduler within 0.05 s"):
        await executor.connected(0.05)


async def test_a_peer_with_another_key_is_refused(executor: ChannelExecutor) -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    stranger = msgspec.structs.replace(executor.endpoint, client_public_key=public, client_secret_key=secret)
    shards = Shards()
    shards.start(stranger, 0, result_of)
    shards.start(executor.endpoint, 1, lambda plan: None)
    with pytest.raises(ShardFailed, match=r"^rank-0 did not connect"):
        await executor.connected(1.0)
    assert executor._missing == {b"rank-0"}, "the shard with the right key is connected, the other one is not"


async def test_a_peer_without_encryption_is_refused() -> None:
    with SecureContext() as context, zmq.Context() as plain_context:
        socket, endpoint = context.bind(zmq.PULL, LOOPBACK)
        plain = plain_context.socket(zmq.PUSH)
        plain.linger = 0
        plain.connect(endpoint.address)
        plain.send(b"plain text")
        right = context.connect(zmq.PUSH, endpoint)
        right.send(b"with the key")
        assert await asyncio.to_thread(socket.poll, 10_000)
        assert socket.recv() == b"with the key"
        assert not await asyncio.to_thread(socket.poll, 300)
        plain.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "::", ""])
def test_sockets_never_listen_on_all_interfaces(host: str) -> None:
    with SecureContext() as context, pytest.raises(ValueError, match="all interfaces"):
        context.bind(zmq.PULL, host)


class Device:
    """Steps are launched at once, and end when a test says so."""

    def __init__(self) -> None:
        self.ended = threading.Semaphore(0)
        self.broken: int | None = None

    def launch(self, plan: StepPlan) -> Launched:
        return Launched(self, plan)


class Launched:
    def __init__(self, device: Device, plan: StepPlan) -> None:
        self._device, self._plan = device, plan

    def result(self) -> StepResult:
        self._device.ended.acquire()
        if self._plan.step == self._device.broken:
            raise RuntimeError("an illegal memory access")
        return result_of(self._plan)


async def test_plans_are_launched_while_steps_run_and_results_keep_their_order(executor: ChannelExecutor) -> None:
    shards, device = Shards(), Device()
    shards.start(executor.endpoint, 0, device.launch)
    shards.start(executor.endpoint, 1, lambda plan: None)
    await executor.connected(10)
    for step in range(3):
        executor.submit(plan_of(step))
    await until(lambda: len(shards.plans[0]) == 3)
    waiting = asyncio.create_task(executor.result())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    device.ended.release(3)
    assert (await waiting).step == 0
    assert [(await executor.result()).step for _ in range(2)] == [1, 2]
    executor.close()
    assert await shards.ended()
    assert not shards.errors


async def test_a_step_that_fails_after_its_launch_is_reported(executor: ChannelExecutor) -> None:
    shards, device = Shards(), Device()
    device.broken = 1
    shards.start(executor.endpoint, 0, device.launch)
    shards.start(executor.endpoint, 1, lambda plan: None)
    await executor.connected(10)
    for step in range(2):
        executor.submit(plan_of(step))
    device.ended.release(2)
    assert (await executor.result()).step == 0
    with pytest.raises(StepFailed, match="step 1: RuntimeError: an illegal memory access"):
        await executor.result()
    await until(lambda: 0 in shards.errors)
