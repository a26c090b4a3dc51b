"""Step messages between the scheduler and its shards: one ROUTER socket, one DEALER per shard.

```
scheduler actor                           shard actors (rank = identity)
ChannelExecutor ── StepPlan to every ──▶  ShardServer: receive, run, reply
                ◀── StepResult ─────────  the output shard only
                ◀── hello, failure ─────  any shard
```

A plan is encoded once and sent to every shard; plans and results are msgpack. The scheduler's side lives on its
event loop and never blocks; a shard's side is a blocking loop in the thread that owns the model.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import zmq

from ..cluster.errors import ShardFailed, StepFailed
from ..cluster.messages import Endpoint
from ..cluster.secure_socket import SecureContext
from ..cluster.step import StepPlan, StepResult
from .executor import Launch, Pending

T = TypeVar("T")

logger = logging.getLogger(__name__)

_HELLO = b"H"
_RESULT = b"R"
_FAILURE = b"F"
_LOST = b"L"
_STOP = b""

DEATH_SECONDS = 0.5
"""How long a fault that a shard reports waits for news of a process that ended: when one dies, its peers' tensor
operations fail at once, and would be taken for the cause."""


def _identity(rank: int) -> bytes:
    return b"rank-%d" % rank


class ChannelExecutor:
    """`Executor` whose shards are other processes. Use it on one event loop."""

    def __init__(self, host: str, num_shards: int) -> None:
        """Listen on `host`, loopback or the node's Ray address, for `num_shards` shards."""
        self._loop = asyncio.get_running_loop()
        self._context = SecureContext()
        self._socket, self.endpoint = self._context.bind(zmq.ROUTER, host)
        self._socket.router_mandatory = True  # a plan for a shard that is not there is an error, and not dropped
        self._shards = [_identity(rank) for rank in range(num_shards)]
        self._missing = set(self._shards)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(StepResult)
        self._results: collections.deque[StepResult] = collections.deque()
        self._failure: ShardFailed | None = None
        self._suspicion: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self._loop.add_reader(self._socket.fileno(), self._drain)

    async def connected(self, within: float) -> None:
        """Wait until every shard has said hello.

        Raises:
            ShardFailed: one failed, or is not here after `within` seconds.
        """
        try:
            async with asyncio.timeout(within):
                while self._missing:
                    await self._wait()
        except TimeoutError:
            names = ", ".join(sorted(identity.decode() for identity in self._missing))
            raise ShardFailed(f"{names} did not connect to the scheduler within {within:g} s") from None

    def submit(self, plan: StepPlan) -> None:
        """Send `plan` to all shards; they run plans in the order of submission.

        Raises:
            ShardFailed: as `result` does. A fault found only now is raised by `result`.
        """
        if self._failure is not None:
            raise self._failure
        if self._suspicion is not None:
            return  # what is wrong is about to be known
        frame = self._encoder.encode(plan)
        for rank, identity in enumerate(self._shards):
            try:
                self._socket.send_multipart((identity, frame), zmq.DONTWAIT)
            except zmq.ZMQError as error:
                self.suspect(ShardFailed(f"shard {rank} is not connected any more: {error}"))
                break
        # The socket's descriptor signals changes of state only, and sending may have consumed one.
        self._drain()

    async def result(self) -> StepResult:
        """The next result, in the order of the plans.

        Raises:
            ShardFailed: a shard raised or died; the executor is of no further use.
        """
        while not self._results:
            await self._wait()
        return self._results.popleft()

    def fail(self, error: ShardFailed) -> None:
        """Make every present and later call raise `error`; the first failure stands."""
        if self._failure is None:
            self._failure = error
        self._wake()

    def suspect(self, error: ShardFailed) -> None:
        """`fail` with `error` unless something else is found to be the cause within `DEATH_SECONDS`."""
        if self._suspicion is None and self._failure is None:
            self._suspicion = self._loop.call_later(DEATH_SECONDS, self.fail, error)

    def close(self) -> None:
        """Tell the shards to stop and close the socket."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket.fileno())
        if self._suspicion is not None:
            self._suspicion.cancel()
        for identity in self._shards:
            with contextlib.suppress(zmq.ZMQError):  # it is gone
                self._socket.send_multipart((identity, _STOP), zmq.DONTWAIT)
        self._context.close()
        self.fail(ShardFailed("the channel to the shards is closed"))

    def _drain(self) -> None:
        """Take in all messages that have arrived."""
        while not self._closed and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            identity, kind, payload = self._socket.recv_multipart(zmq.DONTWAIT)
            if kind == _RESULT:
                self._results.append(self._decoder.decode(payload))
            elif kind == _HELLO:
                self._missing.discard(identity)
            elif kind == _LOST:
                self.suspect(ShardFailed(payload.decode()))
            else:
                self.suspect(StepFailed(payload.decode()))
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        """Until something has happened."""
        if self._failure is not None:
            raise self._failure
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class ShardServer:
    """The shard's side: receives plans, launches them one after another, and reports.

    Where the device works on a step after it was launched, a thread waits for it and passes the result to the loop,
    which alone uses the socket; so the next plan is launched while the one before still runs.
    """

    def __init__(self, endpoint: Endpoint, rank: int, node: str) -> None:
        self._context = SecureContext()
        self._socket: zmq.Socket[Any] = self._context.connect(zmq.DEALER, endpoint, identity=_identity(rank))
        self._name = f"shard {rank} on node {node}"
        self._encoder = msgspec.msgpack.Encoder()
        self._expected: int | None = None  # the first plan may have any number
        self._socket.send_multipart((_HELLO, b""))

    def serve(self, launch: Launch) -> None:
        """Run plans until the scheduler says stop; blocks.

        Raises:
            StepFailed: a step raised. The scheduler has been told; this shard's state is undefined.
            ShardFailed: a plan is missing, as after a connection that broke and was made again. The scheduler has been
                told.
        """
        decoder = msgspec.msgpack.Decoder(StepPlan)
        waiter = _StepWaiter()
        poller = zmq.Poller()
        for socket in (self._socket, waiter.results):
            poller.register(socket, zmq.POLLIN)
        try:
            while True:
                # A CPU's steps are never waited for, and its plans need no poll.
                ready = dict(poller.poll()) if waiter.started else {self._socket: zmq.POLLIN}
                if waiter.results in ready:
                    self._report(*waiter.next())
                if self._socket in ready:
                    frame = self._socket.recv()
                    if frame == _STOP:
                        break
                    plan = decoder.decode(frame)
                    self._check_order(plan)
                    launched = self._attempt(plan.step, functools.partial(launch, plan))
                    if isinstance(launched, StepResult):
                        self._send(launched)
                    elif launched is not None:
                        waiter.wait_for(plan.step, launched)
        finally:
            waiter.close()
            self._context.close()

    def _check_order(self, plan: StepPlan) -> None:
        if self._expected is not None and plan.step != self._expected:
            cause = f"{self._name} got step {plan.step} instead of {self._expected}: plans were lost"
            logger.error("%s", cause)
            self._socket.send_multipart((_LOST, cause.encode()))
            raise ShardFailed(cause)
        self._expected = plan.step + 1

    def _report(self, step: int, outcome: StepResult | Exception) -> None:
        def result() -> StepResult:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        self._send(self._attempt(step, result))

    def _send(self, result: StepResult) -> None:
        self._socket.send_multipart((_RESULT, self._encoder.encode(result)))

    def _attempt(self, step: int, function: Callable[[], T]) -> T:
        """What `function` returns; the scheduler hears of what it raises."""
        try:
            return function()
        except Exception as error:
            cause = f"{self._name} failed in step {step}: {type(error).__name__}: {error}"
            logger.exception("%s", cause)
            self._socket.send_multipart((_FAILURE, cause.encode()))
            raise StepFailed(cause) from error


class _StepWaiter:
    """A thread that waits for launched steps, in order, and wakes whoever polls `results`."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        address = "inproc://results"
        self.results: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        """Readable when a step has ended."""
        self.results.bind(address)
        self._bell: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._bell.connect(address)
        self._launched: queue.SimpleQueue[tuple[int, Pending] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[tuple[int, StepResult | Exception]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Whether any step has been waited for."""
        return self._thread is not None

    def wait_for(self, step: int, pending: Pending) -> None:
        """Wait for a step after those before it."""
        if self._thread is None:  # a CPU's steps have ended when they come back, and need none
            self._thread = threading.Thread(target=self._run, name="results", daemon=True)
            self._thread.start()
        self._launched.put((step, pending))

    def next(self) -> tuple[int, StepResult | Exception]:
        """The outcome of the next step; only when `results` is readable."""
        self.results.recv()
        return self._outcomes.get()

    def close(self) -> None:
        """Let the steps that were launched end."""
        if self._thread is not None:
            self._launched.put(None)
            self._thread.join()
        for socket in (self._bell, self.results):
            socket.close(linger=0)
        self._context.term()

    def _run(self) -> None:
        while (item := self._launched.get()) is not None:
            step, pending = item
            outcome: StepResult | Exception
            try:
                outcome = pending.result()
            except Exception as error:
                outcome = error
            self._outcomes.put((step, outcome))
            self._bell.send(b"")
