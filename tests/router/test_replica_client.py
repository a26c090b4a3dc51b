"""A request survives the death of its replica, and never outlives its reader."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import msgspec
import pytest
import zmq
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, TaskCancelledError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raytroupe.cluster.errors import EngineError, InvalidRequest, QueueFull, ReplicaUnavailable
from raytroupe.cluster.messages import GenerateCall, GenerateReply, ModelCard, TokenBatch
from raytroupe.cluster.request import EngineRequest, FinishReason, SamplingParams, TokenOutput
from raytroupe.cluster.secure_socket import SecureContext
from raytroupe.router.replica_client import ReplicaClient
from raytroupe.router.router import Router
from raytroupe.router.token_receiver import TokenReceiver

LENGTH = 8
"""Tokens of every answer; the token at position p is 100 + p, whoever computes it."""


class Response:
    """What a Serve handle call returns, as far as the client uses it."""

    def __init__(self, replica: Replica, work: asyncio.Task[bytes]) -> None:
        self._replica, self._work = replica, work

    def __await__(self) -> Generator[Any, None, bytes]:
        return asyncio.shield(self._work).__await__()

    def cancel(self) -> None:
        self._work.cancel()
        self._replica.cancelled += 1


class Replica:
    """Stands for the deployment handle and what is behind it: real messages over a real socket, but no model.

    `faults[i]` is what happens to call i: `(tokens sent before, exception to raise or reply to give)`; −1 tokens: the
    call is not even accepted. A fault waits until the reader has seen those tokens, which otherwise might come too
    late to count.
    """

    deployment_name = "demo"

    def __init__(self, context: SecureContext) -> None:
        self.faults: list[tuple[int, Exception | GenerateReply | None]] = []
        self.calls: list[GenerateCall] = []
        self.cancelled = 0
        self.seen: list[int] = []
        self.health: list[Exception | None] = []
        self.generate = self
        self._context = context
        self._sockets: dict[str, zmq.Socket[Any]] = {}

    def remote(self, payload: bytes) -> Response:
        call = msgspec.msgpack.decode(payload, type=GenerateCall)
        self.calls.append(call)
        return Response(self, asyncio.get_running_loop().create_task(self._serve(call, len(self.calls) - 1)))

    def broadcast(self, method: str) -> Replica:
        assert method == "check_health"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Exception | None]:
        if not self.health:
            raise TimeoutError
        return self.health

    async def _serve(self, call: GenerateCall, index: int) -> bytes:
        sent, end = self.faults[index] if index < len(self.faults) else (LENGTH, GenerateReply())
        known = len(call.request.generated)
        if sent >= 0:
            self.send(call, TokenOutput(call.request.request_id, [], index=known))
        for position in range(known, min(known + sent, LENGTH)):
            last = position == LENGTH - 1
            output = TokenOutput(
                call.request.request_id, [100 + position], FinishReason.LENGTH if last else None, index=position
            )
            self.send(call, output)
            await asyncio.sleep(0.001)
        while sent < LENGTH and len(self.seen) < known + sent:  # noqa: ASYNC110 - the reader is the code under test
            await asyncio.sleep(0.001)
        if end is None:
            await asyncio.Event().wait()
        if isinstance(end, Exception):
            raise end
        return msgspec.msgpack.encode(end)

    def send(self, call: GenerateCall, *outputs: TokenOutput) -> None:
        address = call.reply_to.address
        if address not in self._sockets:
            self._sockets[address] = self._context.connect(zmq.PUSH, call.reply_to)
        self._sockets[address].send(msgspec.msgpack.encode(TokenBatch(list(outputs))))


@pytest.fixture
def replica():
    with SecureContext() as context:
        yield Replica(context)


@pytest.fixture
def router():
    return Router([ModelCard(name="demo", path="", max_model_len=64, vocab_size=200)])


@pytest.fixture
async def client(replica, router):
    receiver = TokenReceiver("127.0.0.1")
    yield ReplicaClient({"demo": replica}, receiver, router, max_resubmissions=3, retry_wait_s=0.001)
    assert receiver._mailboxes == {}
    receiver.close()


def request() -> EngineRequest:
    return EngineRequest(request_id="r", prompt=[1, 2], sampling=SamplingParams(max_tokens=LENGTH, seed=3))


def long_request() -> EngineRequest:
    """With several full blocks."""
    return msgspec.structs.replace(request(), prompt=[5] * 300)


async def collect(client: ReplicaClient, replica: Replica) -> list[int]:
    reasons = []
    async for output in client.generate("demo", request()):
        replica.seen += output.tokens
        reasons.append(output.finish_reason)
    assert reasons == [None] * (len(reasons) - 1) + [FinishReason.LENGTH]
    return replica.seen


ANSWER = [100 + position for position in range(LENGTH)]
LOST = [
    ActorDiedError(),
    ActorUnavailableError("network", None),
    TaskCancelledError(),
    GenerateReply("rank 1 died", "ShardFailed"),
    GenerateReply("the ingress could not be reached", "ReplicaUnavailable"),
]


async def test_a_request_runs_on_one_replica(client, replica) -> None:
    assert await collect(client, replica) == ANSWER
    assert len(replica.calls) == 1
    assert replica.cancelled == 0


@pytest.mark.parametrize("end", LOST, ids=lambda end: type(end).__name__)
@pytest.mark.parametrize("sent", [0, 3])
async def test_tokens_so_far_go_to_another_replica_and_none_comes_twice(client, replica, end, sent) -> None:
    replica.faults = [(sent, end), (2, end)]
    assert await collect(client, replica) == ANSWER
    known = [call.request.generated for call in replica.calls]
    assert all(tokens == ANSWER[: len(tokens)] for tokens in known)
    assert [len(tokens) for tokens in known] == [0, sent, sent + 2]
    assert len({call.request.request_id for call in replica.calls}) == 3
    assert {(tuple(call.request.prompt), call.request.sampling.seed) for call in replica.calls} == {((1, 2), 3)}


async def test_late_tokens_of_a_dead_replica_are_dropped(client, replica) -> None:
    replica.faults = [(3, ActorDiedError()), (0, None)]
    outputs = client.generate("demo", request())
    while len(replica.seen) < 3:
        replica.seen += (await anext(outputs)).tokens
    reading = asyncio.create_task(anext(outputs))
    while len(replica.calls) < 2:  # noqa: ASYNC110 - waits for the client's own pause
        await asyncio.sleep(0.005)
    dead, alive = replica.calls
    assert alive.request.generated == ANSWER[:3]
    replica.send(dead, TokenOutput(dead.request.request_id, [666], FinishReason.STOP, index=3))
    replica.send(alive, TokenOutput(alive.request.request_id, [103], index=3))
    assert (await reading).tokens == [103]
    await outputs.aclose()


async def test_after_too_many_deaths_the_client_is_told(client, replica) -> None:
    replica.faults = [(1, ActorDiedError())] * 4
    with pytest.raises(ReplicaUnavailable, match="after 4 attempts"):
        await collect(client, replica)
    assert len(replica.calls) == 4


@pytest.mark.parametrize("kind", ["StepFailed", "EngineError"])
async def test_a_request_in_steps_that_raise_is_resubmitted_once_only(client, replica, kind) -> None:
    replica.faults = [(1, GenerateReply("IndexError in step 3", kind))] * 4
    with pytest.raises(EngineError, match="in 2 steps that failed: IndexError in step 3"):
        await collect(client, replica)
    assert len(replica.calls) == 2


async def test_a_victim_of_another_requests_failed_step_goes_on_elsewhere(client, replica) -> None:
    replica.faults = [(1, GenerateReply("a step raised", "StepFailed")), (1, ActorDiedError())]
    assert await collect(client, replica) == ANSWER
    assert len(replica.calls) == 3


REFUSALS = [
    (-1, GenerateReply("full", "QueueFull")),
    (-1, BackPressureError(1, 1)),
    (-1, DeploymentUnavailableError(DeploymentID("demo"))),
]


async def test_a_resubmitted_request_asks_again_when_it_is_refused(client, replica) -> None:
    replica.faults = [(3, ActorDiedError()), *REFUSALS * 2]
    assert await collect(client, replica) == ANSWER
    assert [len(call.request.generated) for call in replica.calls] == [0] + [3] * 7


async def test_a_resubmitted_request_does_not_ask_forever(client, replica) -> None:
    client._resumption_timeout_s = 0.05
    replica.faults = [(3, ActorDiedError()), *REFUSALS * 1000]
    with pytest.raises((QueueFull, ReplicaUnavailable)):
        await collect(client, replica)


@pytest.mark.parametrize("losses", [0, 1])
async def test_a_request_that_no_replica_accepts_is_refused(client, replica, losses) -> None:
    client._acceptance_timeout_s, client._resumption_timeout_s = 10 * losses + 0.05, 0.05
    replica.faults = [(0, ActorDiedError())] * losses + [(-1, None)] * 2
    with pytest.raises(ReplicaUnavailable, match="has accepted the request in time"):
        await collect(client, replica)
    assert replica.cancelled >= 1


@pytest.mark.parametrize("losses", [0, 1])
async def test_an_accepted_request_may_wait_for_its_first_token(client, replica, losses) -> None:
    client._acceptance_timeout_s = client._resumption_timeout_s = 0.2
    replica.faults = [(0, ActorDiedError())] * losses + [(0, None)]
    reading = asyncio.create_task(collect(client, replica))
    await asyncio.sleep(0.6)
    assert not reading.done()
    call = replica.calls[-1]
    replica.send(call, TokenOutput(call.request.request_id, ANSWER, FinishReason.LENGTH))
    assert await reading == ANSWER
    assert len(replica.calls) == losses + 1


async def test_tokens_lost_on_the_way_are_computed_again(client, replica) -> None:
    replica.faults = [(2, None)]
    reading = asyncio.create_task(collect(client, replica))
    while len(replica.seen) < 2:  # noqa: ASYNC110 - the reader is the code under test
        await asyncio.sleep(0.001)
    call = replica.calls[0]
    replica.send(call, TokenOutput(call.request.request_id, [101], index=1))  # twice
    replica.send(call, TokenOutput(call.request.request_id, [104], index=4))  # two are missing
    assert await reading == ANSWER
    assert [call.request.generated for call in replica.calls] == [[], ANSWER[:2]]
    assert replica.cancelled == 1


async def test_a_reply_without_its_last_tokens_is_a_loss_too(client, replica) -> None:
    client._straggler_timeout_s = 0.05
    replica.faults = [(0, GenerateReply()), (LENGTH, None)]
    assert await collect(client, replica) == ANSWER
    assert len(replica.calls) == 2


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (GenerateReply("full", "QueueFull", 9), QueueFull),
        (GenerateReply("bad", "InvalidRequest"), InvalidRequest),
        (GenerateReply("odd", "SomethingNew"), EngineError),
        (RayTaskError("generate", "traceback", ValueError("bug")), EngineError),
        (BackPressureError(1, 1), QueueFull),
        (RuntimeError("unexpected"), RuntimeError),
    ],
    ids=lambda value: getattr(value, "error_kind", None) or getattr(value, "__name__", type(value).__name__),
)
async def test_other_failures_are_final(client, replica, end, error) -> None:
    replica.faults = [(0, end)]
    with pytest.raises(error) as caught:
        await collect(client, replica)
    assert len(replica.calls) == 1
    if isinstance(end, GenerateReply) and error is QueueFull:
        assert caught.value.retry_after == 9


# --- where a request goes, and what is reserved for it -------------------------------------------------------------


@pytest.fixture
def fleet(router):
    """Two replicas are up; whatever a test does, nothing is reserved at the end."""
    router.set_replicas("demo", ["a", "b"])
    yield router.fleet
    assert router.fleet.num_reserved == 0
    assert len(router._ongoing) == 0
    router.fleet.check_integrity()


async def test_a_call_names_the_replica_that_was_chosen_beforehand(client, replica, fleet) -> None:
    outputs = client.generate("demo", request(), "b")
    assert (await anext(outputs)).tokens
    assert [call.target for call in replica.calls] == ["b"]
    assert fleet.num_reserved == 0  # whoever chose it has reserved for it
    await outputs.aclose()


async def test_without_a_choice_the_client_chooses_and_reserves(client, replica, fleet, router) -> None:
    replica.faults = [(-1, None)]
    outputs = client.generate("demo", request())
    reading = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0.01)
    (call,) = replica.calls
    assert call.target in {"a", "b"}
    assert fleet.num_reserved == 1
    row = fleet.row(call.target)
    assert fleet.state(row).sent == 1
    assert fleet.state(row).sent_tokens == len(call.request.prompt)
    fleet.report(call.target, fleet.state(row).load, [call.request.request_id])
    assert fleet.num_reserved == 0
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_without_any_replica_any_may_take_the_call(client, replica) -> None:
    assert await collect(client, replica) == ANSWER
    assert replica.calls[0].target == ""


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [(3, ActorDiedError())],
        [(0, ActorDiedError()), (3, ActorDiedError()), *REFUSALS],
        [(0, GenerateReply("full", "QueueFull", 9))],
        [(0, GenerateReply("bad", "InvalidRequest"))],
        [(1, ActorDiedError())] * 4,
    ],
    ids=len,
)
async def test_nothing_is_reserved_when_a_request_has_ended(client, replica, fleet, faults) -> None:
    replica.faults = faults
    reading = asyncio.gather(collect(client, replica), return_exceptions=True)
    (end,) = await reading
    assert end == ANSWER or isinstance(end, QueueFull | InvalidRequest | ReplicaUnavailable)


async def test_closing_before_the_first_output_releases_what_was_reserved_for_it(client, router, fleet) -> None:
    decision = router.place("demo", request())
    router.reserve("r~0", decision, request().latency)
    outputs = client.generate("demo", request(), decision.replica)
    assert fleet.num_reserved == 1
    await outputs.aclose()
    assert fleet.num_reserved == 0


async def test_the_first_token_ends_the_expectation_of_its_prompt(client, replica, router, fleet) -> None:
    replica.faults = [(2, None)]
    outputs = client.generate("demo", long_request())
    assert (await anext(outputs)).tokens
    assert not router._ongoing._expected
    assert router._ongoing._demand
    await outputs.aclose()


async def test_a_replica_that_loses_a_request_is_avoided(client, replica, fleet) -> None:
    replica.faults = [(2, ActorDiedError())]
    assert await collect(client, replica) == ANSWER
    first, second = (call.target for call in replica.calls)
    assert {first, second} == {"a", "b"}
    assert [fleet.state(row).name for row in fleet.candidates(("demo",))] == [second]


@pytest.mark.parametrize("end", [GenerateReply("full", "QueueFull"), GenerateReply("bad", "InvalidRequest")])
async def test_a_replica_that_refuses_a_request_is_no_suspect(client, replica, fleet, end) -> None:
    replica.faults = [(0, end)]
    with pytest.raises((QueueFull, InvalidRequest)):
        await collect(client, replica)
    assert len(fleet.candidates(("demo",))) == 2


async def test_the_tokens_so_far_count_where_the_request_goes_next(client, replica, router, fleet) -> None:
    replica.faults = [(3, ActorDiedError()), (0, None)]
    outputs = client.generate("demo", request())
    while len(replica.seen) < 3:
        replica.seen += (await anext(outputs)).tokens
    reading = asyncio.create_task(anext(outputs))
    while len(replica.calls) < 2:  # noqa: ASYNC110 - waits for the client's own pause
        await asyncio.sleep(0.002)
    state = fleet.state(fleet.row(replica.calls[1].target))
    assert (state.sent, state.sent_tokens) == (1, 2 + 3)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await outputs.aclose()


# --- where another model could answer ------------------------------------------------------------------------------


async def impatiently(client: ReplicaClient, replica: Replica) -> list[int]:
    async for output in client.generate("demo", request(), patient=False):
        replica.seen += output.tokens
    return replica.seen


async def test_an_impatient_request_does_not_wait_for_a_replica_to_come_up(client, replica) -> None:
    with pytest.raises(ReplicaUnavailable, match="no replica of 'demo' is up"):
        await impatiently(client, replica)
    assert replica.calls == []


@pytest.mark.parametrize("end", LOST[:3], ids=lambda end: type(end).__name__)
async def test_an_impatient_request_that_is_lost_before_its_first_token_is_given_back(
    client, replica, fleet, end
) -> None:
    replica.faults = [(0, end)] * 3
    with pytest.raises(ReplicaUnavailable, match="was lost"):
        await impatiently(client, replica)
    assert {call.target for call in replica.calls} == fleet.replicas("demo"), "each was tried once"
    assert len(replica.calls) == 2


@pytest.mark.parametrize("end", LOST[:3], ids=lambda end: type(end).__name__)
async def test_an_impatient_request_goes_to_another_replica_of_its_model_first(client, replica, fleet, end) -> None:
    replica.faults = [(0, end)]
    assert await impatiently(client, replica) == ANSWER
    assert len({call.target for call in replica.calls}) == 2


async def test_an_impatient_request_that_was_lost_does_not_wait_for_a_place(client, replica, fleet) -> None:
    full = GenerateReply(error="full", error_kind="QueueFull", retry_after=7)
    replica.faults = [(0, ActorDiedError()), (-1, full)]
    with pytest.raises(QueueFull) as refused:
        await impatiently(client, replica)
    assert refused.value.retry_after == 7
    assert len(replica.calls) == 2


async def test_an_impatient_request_that_was_lost_has_no_more_time_than_before(client, replica, fleet) -> None:
    client._acceptance_timeout_s = 0.2
    replica.faults = [(0, ActorDiedError()), (-1, None)]
    with pytest.raises(ReplicaUnavailable, match="accepted the request in time"):
        await impatiently(client, replica)


async def test_an_impatient_request_that_was_lost_does_not_wait_for_a_replacement(client, replica, fleet) -> None:
    replica.faults = [(-1, ActorDiedError()), (-1, DeploymentUnavailableError(DeploymentID("demo")))]
    with pytest.raises(ReplicaUnavailable):
        await impatiently(client, replica)
    assert len(replica.calls) == 2


async def test_an_impatient_request_whose_answer_has_begun_goes_on_elsewhere(client, replica, fleet) -> None:
    replica.faults = [(3, ActorDiedError())]
    assert await impatiently(client, replica) == ANSWER
    assert [len(call.request.generated) for call in replica.calls] == [0, 3]


async def test_closing_the_generator_cancels_the_call(client, replica) -> None:
    replica.faults = [(2, None)]
    outputs = client.generate("demo", request())
    assert (await anext(outputs)).tokens[0] == 100
    await outputs.aclose()
    assert replica.cancelled == 1


async def test_cancelling_the_reader_cancels_the_call(client, replica) -> None:
    replica.faults = [(0, None)]
    reading = asyncio.create_task(collect(client, replica))
    await asyncio.sleep(0.02)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert replica.cancelled == 1


@pytest.mark.parametrize(
    ("health", "stalled"),
    [([None], []), ([EngineError("stuck"), None], []), ([EngineError("stuck")], ["demo"]), ([], ["demo"])],
)
async def test_a_model_is_healthy_if_one_replica_says_so(client, replica, health, stalled) -> None:
    replica.health = health
    assert await client.stalled_models() == stalled
