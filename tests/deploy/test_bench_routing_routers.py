"""The routers that ours is compared with: they rank as they say, and Ray's reads our calls."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from ray.serve.request_router import RequestRouter

from raytroupe.cluster.errors import ConfigError
from raytroupe.cluster.messages import Endpoint, GenerateCall
from raytroupe.cluster.request import EngineRequest, SamplingParams
from raytroupe.deploy.bench.routing.prompt_text import prompt_text
from raytroupe.deploy.bench.routing.round_robin import RoundRobin
from raytroupe.deploy.bench.routing.routers import OURS, ROUTERS, parse_routers


def encoded(prompt: list[int]) -> bytes:
    request = EngineRequest(request_id="r", prompt=prompt, sampling=SamplingParams())
    return msgspec.msgpack.encode(GenerateCall(request, Endpoint("tcp://127.0.0.1:1", "a", "b", "c")))


def without_ray(kind: type[RequestRouter]) -> Any:
    """A router that is connected to nothing."""
    return object.__new__(kind)


def replicas(*names: str) -> list[Any]:
    return [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in names]


async def test_round_robin_takes_turns_and_falls_back_to_the_next() -> None:
    router = without_ray(RoundRobin)
    router.initialize_state()
    pending: Any = SimpleNamespace(routing_context=SimpleNamespace(should_backoff=False))
    seen = []
    for order in ("abc", "cab", "bca", "abc"):  # Serve's order does not matter
        ranks = await router.choose_replicas(replicas(*order), pending)
        seen.append("".join(rank[0].replica_id.unique_id for rank in ranks))
        assert all(len(rank) == 1 for rank in ranks)
    assert seen == ["abc", "bca", "cab", "abc"]
    assert pending.routing_context.should_backoff
    assert await router.choose_replicas([]) == []


def test_prompts_and_texts_share_equally_long_beginnings() -> None:
    prompt = [16, 0, 1279, 0xD7FF, 0xD800, 0xDFFF, 0xE000, 200_000]
    text = prompt_text(encoded(prompt))
    assert len(text) == len(prompt)
    assert len(set(text)) == len(prompt), "different tokens are different characters"
    text.encode()  # no surrogates, which could not be sent
    assert prompt_text(encoded([*prompt[:3], 5])) == text[:3] + chr(5)
    assert prompt_text(encoded([])) == ""


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != OURS])
def test_import_paths_name_request_routers(name: str) -> None:
    path = ROUTERS[name].import_path
    assert path is not None
    module, _, attribute = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        pytest.skip(f"Ray cannot import it here: {error}")
    assert issubclass(found, RequestRouter)
    if name.startswith("prefix-affinity"):
        pending = SimpleNamespace(args=[encoded([65, 66])])
        assert without_ray(found)._extract_text_from_request(pending) == "AB"


def test_unknown_routers_are_refused() -> None:
    assert parse_routers("all")[0] == OURS
    assert parse_routers("round-robin, troupe") == ["round-robin", "troupe"]
    for text in ("random", "troupe,troupe"):
        with pytest.raises(ConfigError, match=f"--routers '{text}'"):
            parse_routers(text)
