"""The local executor: order, failure with its cause, cancellation, and an end without waiting plans."""

import asyncio
import threading
import time

import pytest

from raytroupe.actors.executor import LocalExecutor
from raytroupe.cluster.errors import ShardFailed, StepFailed
from raytroupe.cluster.step import StepPlan, StepResult


def make_plan(step: int) -> StepPlan:
    return StepPlan(step, [], [], [], [], [], 0, [], [])


def echo(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, [plan.step], None, 0.0, 0.0)


@pytest.fixture
def executor_of():
    executors = []

    def build(run):
        executors.append(LocalExecutor(run))
        return executors[-1]

    yield build
    for executor in executors:
        executor.close()


async def test_results_come_in_the_order_of_the_plans(executor_of):
    executor = executor_of(echo)
    for step in range(50):
        executor.submit(make_plan(step))
    assert [(await executor.result()).step for _ in range(50)] == list(range(50))


async def test_submit_returns_while_the_shard_computes(executor_of):
    release = threading.Event()

    def run(plan):
        release.wait()
        return echo(plan)

    executor = executor_of(run)
    executor.submit(make_plan(0))
    executor.submit(make_plan(1))
    release.set()
    assert [(await executor.result()).step for _ in range(2)] == [0, 1]


async def test_a_failure_reaches_every_plan_behind_it_with_its_cause(executor_of):
    def run(plan):
        if plan.step == 1:
            raise ValueError("out of tune")
        return echo(plan)

    executor = executor_of(run)
    for step in range(3):
        executor.submit(make_plan(step))
    assert (await executor.result()).step == 0
    with pytest.raises(StepFailed, match="step 1: ValueError: out of tune") as caught:
        await executor.result()
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ShardFailed):
        await executor.result()
    with pytest.raises(ShardFailed):
        executor.submit(make_plan(3))


async def test_a_cancelled_wait_loses_no_result(executor_of):
    release = threading.Event()

    def run(plan):
        release.wait()
        return echo(plan)

    executor = executor_of(run)
    executor.submit(make_plan(0))
    waiting = asyncio.create_task(executor.result())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    release.set()
    assert (await executor.result()).step == 0


async def test_a_result_that_comes_while_the_loop_begins_to_wait_is_not_missed(executor_of, monkeypatch):
    release = threading.Event()

    def run(plan):
        release.wait()
        return echo(plan)

    executor = executor_of(run)
    loop = asyncio.get_running_loop()
    make_future = loop.create_future

    def make_future_late():
        """`result` has found no outcome; now one comes, and whoever reports it finds nobody to wake."""
        monkeypatch.undo()
        release.set()
        while not executor._outcomes:
            time.sleep(0.001)
        time.sleep(0.05)
        return make_future()

    executor.submit(make_plan(0))
    monkeypatch.setattr(loop, "create_future", make_future_late)
    async with asyncio.timeout(10):
        assert (await executor.result()).step == 0


def test_close_drops_waiting_plans_and_ends_the_thread(executor_of):
    started, release = threading.Event(), threading.Event()
    ran = []

    def run(plan):
        started.set()
        release.wait()
        ran.append(plan.step)
        return echo(plan)

    executor = executor_of(run)
    executor.submit(make_plan(0))
    executor.submit(make_plan(1))
    started.wait()
    closing = threading.Thread(target=executor.close)
    closing.start()
    while executor._failure is None:  # closing has begun, and waits for the first plan
        time.sleep(0.001)
    release.set()
    closing.join()
    executor.close()
    assert ran == [0]

    async def results():
        assert (await executor.result()).step == 0
        with pytest.raises(ShardFailed, match="closed"):
            await executor.result()

    asyncio.run(results())
    assert not any(thread.name == "shard" for thread in threading.enumerate())


class Steps:
    """A device: steps are launched at once, and end when a test says so."""

    def __init__(self) -> None:
        self.launched: list[int] = []
        self.ended = threading.Semaphore(0)
        self.broken: int | None = None

    def wait_for(self, count: int) -> None:
        while len(self.launched) < count:
            time.sleep(0.001)

    def launch(self, plan: StepPlan):
        self.launched.append(plan.step)
        return _Pending(self, plan)


class _Pending:
    def __init__(self, steps: Steps, plan: StepPlan) -> None:
        self._steps, self._plan = steps, plan

    def result(self) -> StepResult:
        self._steps.ended.acquire()
        if self._plan.step == self._steps.broken:
            raise RuntimeError("an illegal memory access")
        return echo(self._plan)


async def test_a_plan_is_launched_while_the_one_before_still_runs(executor_of):
    steps = Steps()
    executor = executor_of(steps.launch)
    for step in range(2):
        executor.submit(make_plan(step))
    await asyncio.to_thread(steps.wait_for, 2)
    waiting = asyncio.create_task(executor.result())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    steps.ended.release()
    assert (await waiting).step == 0
    executor.submit(make_plan(2))
    await asyncio.to_thread(steps.wait_for, 3)
    steps.ended.release(2)
    assert [(await executor.result()).step for _ in range(2)] == [1, 2]


async def test_a_fault_found_after_the_launch_ends_the_executor(executor_of):
    steps = Steps()
    steps.broken = 1
    executor = executor_of(steps.launch)
    for step in range(3):
        executor.submit(make_plan(step))
    steps.ended.release(3)
    assert (await executor.result()).step == 0
    with pytest.raises(StepFailed, match="step 1: RuntimeError: an illegal memory access"):
        await executor.result()
    with pytest.raises(ShardFailed):
        executor.submit(make_plan(3))


def test_close_waits_for_launched_steps_and_ends_both_threads(executor_of):
    steps = Steps()
    executor = executor_of(steps.launch)
    executor.submit(make_plan(0))
    steps.ended.release()
    executor.close()
    assert not any(thread.name in ("shard", "results") for thread in threading.enumerate())
