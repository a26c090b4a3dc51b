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
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from ..cluster.errors import ShardFailed, StepFailed
from ..cluster.messages import Endpoint
from ..cluster.secure_socket import SecureContext
from ..cluster.step import StepPlan, StepResult

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
    """The shard's side: receives plans, runs them one after another, and reports."""

    def __init__(self, endpoint: Endpoint, rank: int, node: str) -> None:
        self._context = SecureContext()
        self._socket: zmq.Socket[Any] = self._context.connect(zmq.DEALER, endpoint, identity=_identity(rank))
        self._name = f"shard {rank} on node {node}"
        self._socket.send_multipart((_HELLO, b""))

    def serve(self, run: Callable[[StepPlan], StepResult | None]) -> None:
        """Run plans until the scheduler says stop; blocks.

        Raises:
            StepFailed: `run` raised. The scheduler has been told; this shard's state is undefined.
            ShardFailed: a plan is missing, as after a connection that broke and was made again. The scheduler has been
                told.
        """
        encoder = msgspec.msgpack.Encoder()
        decoder = msgspec.msgpack.Decoder(StepPlan)
        try:
            expected: int | None = None  # the first plan may have any number
            while frame := self._socket.recv():
                plan = decoder.decode(frame)
                if expected is not None and plan.step != expected:
                    cause = f"{self._name} got step {plan.step} instead of {expected}: plans were lost"
                    logger.error("%s", cause)
                    self._socket.send_multipart((_LOST, cause.encode()))
                    raise ShardFailed(cause)
                expected = plan.step + 1
                try:
                    result = run(plan)
                except Exception as error:
                    cause = f"{self._name} failed in step {plan.step}: {type(error).__name__}: {error}"
                    logger.exception("%s", cause)
                    self._socket.send_multipart((_FAILURE, cause.encode()))
                    raise StepFailed(cause) from error
                if result is not None:
                    self._socket.send_multipart((_RESULT, encoder.encode(result)))
        finally:
            self._context.close()
