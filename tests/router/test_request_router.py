"""Serve's router hook: reads the size of a call, ranks replicas, and keeps its books through every ending."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from raytroupe.cluster.messages import Endpoint, GenerateCall
from raytroupe.cluster.request import EngineRequest, SamplingParams
from raytroupe.router.request_router import FewestOutstandingTokens, call_tokens

MODEL = DeploymentID("demo", "troupe")
ENDPOINT = Endpoint("tcp://127.0.0.1:1", "a", "b", "c")


class Running:
    """The part of Serve's `RunningReplica` that a ranking looks at."""

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, MODEL)


def encoded(prompt: int, max_tokens: int) -> bytes:
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(1,), logit_bias={5: 1.0})
    request = EngineRequest(request_id="r", prompt=[70_000] * prompt, sampling=sampling, generated=[1, 2])
    return msgspec.msgpack.encode(GenerateCall(request, ENDPOINT))


def pending(request: str, *args: object) -> PendingRequest:
    return PendingRequest(list(args), {}, RequestMetadata(request_id="http", internal_request_id=request))


@pytest.fixture
async def router() -> FewestOutstandingTokens:
    router = FewestOutstandingTokens(MODEL, DeploymentHandleSource.REPLICA)
    router.initialize_state()
    return router


REPLICAS = [Running("a"), Running("b"), Running("c")]


def outstanding(router: FewestOutstandingTokens) -> dict[str, int]:
    return {name: router._book.candidate(name).outstanding_tokens for name in "abc"}


@pytest.mark.parametrize("prompt", [0, 1, 15, 16, 65_535, 65_536])
def test_the_size_of_a_call_is_prompt_and_max_tokens(prompt: int) -> None:
    assert call_tokens(encoded(prompt, 300)) == prompt + 300


async def test_requests_of_one_moment_are_spread_by_size(router) -> None:
    chosen = []
    for index, size in enumerate([1000, 10, 10, 10, 10]):
        ranks = await router.choose_replicas(REPLICAS, pending(f"r{index}", encoded(0, size)))
        assert sorted(rank[0].replica_id.unique_id for rank in ranks) == ["a", "b", "c"]
        chosen.append(ranks[0][0].replica_id.unique_id)
    assert chosen.count(chosen[0]) == 1
    assert sorted(outstanding(router).values()) == [20, 20, 1000]


async def test_a_request_counts_where_it_was_accepted_until_its_call_ends(router) -> None:
    request = pending("r", encoded(5, 10))
    (first, *_), (second, *_), _ = await router.choose_replicas(REPLICAS, request)
    assert request.routing_context.should_backoff
    router.on_request_completed(first.replica_id, "r")  # refused there
    router.on_request_routed(request, second.replica_id, None)
    assert outstanding(router)[second.replica_id.unique_id] == 15
    router.on_request_completed(first.replica_id, "r")  # of the refused attempt, late
    assert outstanding(router)[second.replica_id.unique_id] == 15
    router.on_request_completed(second.replica_id, "r")
    assert set(outstanding(router).values()) == {0}


async def test_a_request_that_is_cancelled_before_it_was_sent_is_forgotten(router) -> None:
    request = pending("r", encoded(5, 10))
    await router.choose_replicas(REPLICAS, request)
    assert sorted(outstanding(router).values()) == [0, 0, 15]
    request.future.cancel()
    await asyncio.sleep(0)
    assert set(outstanding(router).values()) == {0}


async def test_other_methods_weigh_nothing(router) -> None:
    await router.choose_replicas(REPLICAS, pending("r"))
    await router.choose_replicas(REPLICAS, pending("s", {"not": "a call"}))
    assert set(outstanding(router).values()) == {0}


async def test_without_replicas_there_is_no_rank(router) -> None:
    assert await router.choose_replicas([], pending("r", encoded(1, 1))) == []
