"""Serve's router hook: the chosen replica first, any other after it, and word of which replicas there are."""

from __future__ import annotations

import msgspec
import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from raytroupe.cluster.messages import Endpoint, GenerateCall, SubscribeCall
from raytroupe.cluster.request import EngineRequest, SamplingParams
from raytroupe.router import replica_registry
from raytroupe.router.request_router import ChosenReplica

MODEL = DeploymentID("demo", "troupe")
ENDPOINT = Endpoint("tcp://127.0.0.1:1", "a", "b", "c")
REQUEST = EngineRequest(request_id="r", prompt=[70_000] * 3, sampling=SamplingParams())


class Running:
    """The part of Serve's `RunningReplica` that a ranking looks at."""

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, MODEL)


REPLICAS = [Running("a"), Running("b"), Running("c")]


def pending(*args: object) -> PendingRequest:
    return PendingRequest(list(args), {}, RequestMetadata(request_id="http", internal_request_id="r"))


@pytest.fixture
async def router() -> ChosenReplica:
    router = ChosenReplica(MODEL, DeploymentHandleSource.REPLICA)
    router.initialize_state()
    return router


async def ranked(router: ChosenReplica, request: PendingRequest | None) -> list[str]:
    ranks = await router.choose_replicas(REPLICAS, request)
    assert all(len(rank) == 1 for rank in ranks)
    return [rank[0].replica_id.unique_id for rank in ranks]


@pytest.mark.parametrize("call", [GenerateCall(REQUEST, ENDPOINT, "b"), SubscribeCall(ENDPOINT, "b")])
async def test_the_chosen_replica_comes_first_and_all_others_after_it(router, call) -> None:
    for _ in range(20):
        request = pending(msgspec.msgpack.encode(call))
        names = await ranked(router, request)
        assert names[0] == "b"
        assert sorted(names) == ["a", "b", "c"]
        assert request.routing_context.should_backoff


@pytest.mark.parametrize(
    "args", [(msgspec.msgpack.encode(GenerateCall(REQUEST, ENDPOINT, "gone")),), (), ({"no": "call"},)]
)
async def test_without_a_choice_any_replica_may_be_first(router, args) -> None:
    orders = [await ranked(router, pending(*args)) for _ in range(60)]
    assert all(sorted(names) == ["a", "b", "c"] for names in orders)
    assert {names[0] for names in orders} == {"a", "b", "c"}


async def test_without_a_request_there_is_an_order_all_the_same(router) -> None:
    assert sorted(await ranked(router, None)) == ["a", "b", "c"]
    assert await router.choose_replicas([], pending()) == []


def test_whoever_watches_hears_of_the_replicas_before_and_after() -> None:
    heard: list[tuple[str, tuple[str, ...]]] = []
    replica_registry.announce("before", ("a",))
    stop = replica_registry.watch(lambda deployment, replicas: heard.append((deployment, replicas)))
    replica_registry.announce("after", ("b", "c"))
    stop()
    replica_registry.announce("after", ())
    assert ("before", ("a",)) in heard
    assert heard[-1] == ("after", ("b", "c"))
