"""What a client sees of routing: groups, classes, salts, the route header and its dry run, drafts and fallbacks."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from routing_fleet import load

from raytroupe.cluster.errors import EngineError, QueueFull, ReplicaUnavailable
from raytroupe.cluster.latency_class import DEFAULT_TARGETS, LatencyTargets
from raytroupe.cluster.messages import ModelCard
from raytroupe.cluster.router_config import EscalationConfig, RouterConfig, RuleConfig
from raytroupe.router.api import build_app
from raytroupe.router.router import Router

DEMO = Path(__file__).parents[2] / "deploy" / "demo_models" / "demo-large"
BODY: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}
COMPLETION: dict[str, Any] = {"model": "auto", "prompt": "Once upon a time"}
CARDS = [
    ModelCard(name=name, path=str(DEMO), max_model_len=256, vocab_size=1280, eos_token_ids=(6, 2), weight_bytes=weight)
    for name, weight in (("large", 9), ("small", 1))
]
EITHER = [RuleConfig(name="any", use=["large", "small"])]
"""A rule by which the cost decides."""


class Service:
    """The application around a router with two replicas of each model."""

    def __init__(self, engine: Any, config: RouterConfig, cards: list[ModelCard]) -> None:
        self.engine = engine
        self.router = Router(cards, config)
        for card in cards:
            self.router.set_replicas(card.name, [f"{card.name}-1", f"{card.name}-2"])
        self.app = build_app(cards, engine, self.router)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://troupe/v1/")

    async def post(self, body: dict[str, Any] = BODY, path: str = "chat/completions", **headers: str) -> httpx.Response:
        return await self.http.post(
            path, json=body, headers={name.replace("_", "-"): text for name, text in headers.items()}
        )

    async def begun(self, count: int = 1) -> str:
        """Wait until the engine has begun so many more requests; the id of the last one."""
        async with asyncio.timeout(10):
            for _ in range(count - 1):
                await self.engine.began.get()
            return await self.engine.began.get()

    @property
    def models(self) -> list[str]:
        """Those that the engine was asked for, in order."""
        return [model for model, _, _ in self.engine.asked]

    def down(self, *models: str) -> None:
        self.engine.down = set(models)

    def nothing_is_left(self) -> None:
        assert self.router.fleet.num_reserved == 0
        assert len(self.router._ongoing) == 0
        assert not self.engine.running
        self.router.fleet.check_integrity()


Serve = Callable[..., Service]


@pytest.fixture
async def serve(engine: Any) -> AsyncIterator[Serve]:
    """Makes services; when the test is done, none of them may hold anything any more."""
    made: list[Service] = []

    def serve(*, cards: list[ModelCard] | None = None, **fields: Any) -> Service:
        made.append(Service(engine, RouterConfig(**fields), cards or CARDS))
        return made[-1]

    yield serve
    for service in made:
        service.nothing_is_left()
        await service.http.aclose()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def answer_of(response: httpx.Response, stream: bool) -> str:
    if not stream:
        return response.json()["choices"][0]["message"]["content"]
    choices = [choice for event in events(response) for choice in event["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def test_the_list_of_models_has_groups_and_measured_quality(serve) -> None:
    measured = msgspec.structs.replace(
        CARDS[0], accuracy=0.9, task_accuracy={"addition": 1.0, "facts": 0.8}, price_per_hour=2.5
    )
    service = serve(cards=[measured, CARDS[1]], groups={"cheap": ["small"]})
    listed = {model["id"]: model for model in (await service.http.get("models")).json()["data"]}
    assert list(listed) == ["large", "small", "auto", "cheap"]
    assert listed["large"]["accuracy"] == 0.9
    assert listed["large"]["task_accuracy"] == {"addition": 1.0, "facts": 0.8}
    assert listed["large"]["price_per_hour"] == 2.5
    assert listed["small"]["accuracy"] is None
    assert listed["auto"]["members"] == ["large", "small"]
    assert (await service.http.get("models/cheap")).json() == listed["cheap"]
    assert (await service.http.get("models/dear")).status_code == 404


STREAM = pytest.mark.parametrize("stream", [False, True])

# --- models and groups ------------------------------------------------------------------------------------------


@STREAM
@pytest.mark.parametrize(
    ("name", "model"), [("auto", "large"), ("cheap", "small"), ("large", "large"), ("small", "small")]
)
async def test_a_group_is_answered_by_one_of_its_models_and_a_name_by_the_model(serve, name, model, stream) -> None:
    service = serve(groups={"cheap": ["small"]})
    response = await service.post(BODY | {"model": name, "stream": stream})
    assert response.status_code == 200
    assert service.models == [model]
    shown = [event["model"] for event in events(response)] if stream else [response.json()["model"]]
    assert set(shown) == {model}


async def test_an_unknown_model_is_told_the_models_and_groups(serve) -> None:
    response = await serve(groups={"cheap": ["small"]}).post(BODY | {"model": "huge"})
    assert response.status_code == 404
    message = response.json()["error"]["message"]
    assert "'huge'" in message
    assert "served: large, small, auto, cheap" in message


async def test_the_engine_gets_the_replica_that_was_decided(serve) -> None:
    service = serve()
    route = (await service.post(path="route")).json()
    await service.post(BODY | {"model": "large"})
    assert service.engine.asked == [("large", route["replica"], True)]


async def test_every_choice_after_the_first_finds_its_own_replica(serve) -> None:
    service = serve()
    await service.post(BODY | {"n": 3})
    assert [replica is None for _, replica, _ in service.engine.asked] == [False, True, True]


# --- latency classes ----------------------------------------------------------------------------------------------


@STREAM
@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        ({}, {}, DEFAULT_TARGETS["default"]),
        ({"service_tier": "auto"}, {}, DEFAULT_TARGETS["default"]),
        ({"service_tier": "flex"}, {}, DEFAULT_TARGETS["batch"]),
        ({"service_tier": "priority"}, {}, DEFAULT_TARGETS["interactive"]),
        ({"service_tier": "flex"}, {"x_latency_class": "interactive"}, DEFAULT_TARGETS["interactive"]),
        ({}, {"X_Latency_Class": "batch"}, DEFAULT_TARGETS["batch"]),
        (
            {},
            {"x_ttft_target_ms": "4000", "x_tpot_target_ms": "150"},
            LatencyTargets(name="explicit", ttft=4.0, tpot=0.15, refuse_late=True),
        ),
    ],
)
async def test_the_latency_class_reaches_the_engine(serve, body, headers, expected, stream) -> None:
    service = serve()
    assert (await service.post(BODY | body | {"stream": stream, "n": 2}, **headers)).status_code == 200
    assert [request.latency for request in service.engine.requests] == [expected] * 2


@pytest.mark.parametrize("path", ["chat/completions", "completions", "route"])
@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({}, {"x_latency_class": "fast"}, "x-latency-class"),
        ({"service_tier": "scale"}, {}, "service_tier"),
        ({}, {"x_ttft_target_ms": "-5"}, "x-ttft-target-ms"),
        ({}, {"x_ttft_target_ms": "nan"}, "x-ttft-target-ms"),
        ({}, {"x_tpot_target_ms": "inf"}, "x-tpot-target-ms"),
        ({}, {"x_tpot_target_ms": "1e300"}, "x-tpot-target-ms"),
    ],
)
async def test_a_class_or_target_that_makes_no_sense_is_a_bad_request(serve, path, body, headers, param) -> None:
    service = serve()
    response = await service.post((COMPLETION if path == "completions" else BODY) | body, path, **headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert service.engine.requests == []


async def test_a_target_that_no_replica_can_ever_meet_is_a_bad_request(serve) -> None:
    service = serve()
    for replica in ("large-1", "large-2"):
        service.router.fleet.report(replica, load())
    response = await service.post(x_ttft_target_ms="2")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-ttft-target-ms"
    assert "at least 10.1 ms" in response.json()["error"]["message"]


@STREAM
async def test_a_target_that_cannot_be_met_now_is_refused_with_the_time_to_wait(serve, stream) -> None:
    service = serve()
    for replica in ("large-1", "large-2"):
        service.router.fleet.report(replica, load(prefill_tokens=50_000))
    response = await service.post(BODY | {"stream": stream}, x_ttft_target_ms="500")
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "target_unreachable"
    assert 10 <= int(response.headers["retry-after"]) <= 15
    assert service.engine.requests == []


# --- salts --------------------------------------------------------------------------------------------------------


async def salts(service: Service, *asked: tuple[str | None, str | None]) -> list[str]:
    for key, salt in asked:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        await service.post(BODY | ({} if salt is None else {"cache_salt": salt}), **headers)
    return [request.cache_salt for request in service.engine.requests]


async def test_api_keys_share_no_cache_if_so_configured(serve) -> None:
    asked = [("alice", None), ("alice", None), ("bob", None), (None, None), (None, None), ("alice", "x"), ("bob", "x")]
    found = await salts(serve(salt_by_api_key=True), *asked)
    assert found[0] == found[1]
    assert found[3] == found[4]
    assert len({found[0], found[2], found[3], found[5], found[6]}) == 5
    assert not any("alice" in salt or "bob" in salt for salt in found)


async def test_a_client_cannot_spell_the_salt_of_another_key(serve) -> None:
    """Whatever it sends as its own salt, its key stands before it."""
    service = serve(salt_by_api_key=True)
    alice = (await salts(service, ("alice", None)))[0]
    service.engine.requests.clear()
    assert alice not in await salts(service, ("bob", alice), (None, alice), ("bob", alice.rstrip("/")), (None, "/"))


async def test_without_that_only_the_clients_own_salt_counts(serve) -> None:
    assert await salts(serve(), ("alice", None), ("bob", None), ("bob", "mine")) == ["", "", "mine"]


# --- the header ---------------------------------------------------------------------------------------------------


def check_header(response: httpx.Response) -> dict[str, str]:
    text = response.headers["x-troupe-route"]
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= 512
    fields: dict[str, str] = {}
    for part in text.split("; "):
        name, found, value = part.partition("=")
        if found:
            fields.setdefault(name, value)
    return fields


@STREAM
@pytest.mark.parametrize(("path", "body"), [("chat/completions", BODY), ("completions", COMPLETION)])
async def test_the_header_says_who_answers_and_why(serve, path, body, stream) -> None:
    service = serve()
    response = await service.post(body | {"stream": stream, "max_tokens": 4}, path)
    found = check_header(response)
    assert found["model"] == "large"
    assert found["replica"] == service.engine.asked[0][1]
    cached, total = found["cached"].split("/")
    assert (int(cached), int(total)) == (0, len(service.engine.requests[0].prompt))
    assert int(found["ttft_ms"]) > 0
    assert found["reason"].startswith("best model: no classifier")


@pytest.mark.parametrize("hostile", ["r\r\nx-evil: 1", "r\0\x7f\x1b[31m", "ré\u2028模型", "x" * 64, "a; model=b"])
async def test_a_hostile_name_cannot_break_the_header(serve, hostile) -> None:
    name = hostile.encode("ascii", "replace").decode() + "y" * 600  # Ray's metrics take ASCII names only
    cards = [msgspec.structs.replace(CARDS[0], name=name), CARDS[1]]
    service = serve(cards=cards, rules=[RuleConfig(name=hostile, use=["small"])])
    assert check_header(await service.post())["model"] == "small"
    response = await service.post(BODY | {"model": cards[0].name})
    assert response.status_code == 200
    assert "x-evil" not in response.headers
    check_header(response)


# --- the dry run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [BODY, COMPLETION, COMPLETION | {"prompt": ["one", "two"]}, BODY | {"model": "small"}])
async def test_a_dry_run_generates_and_reserves_nothing(serve, body) -> None:
    service = serve()
    response = await service.post(body, "route")
    assert response.status_code == 200
    assert service.engine.requests == []
    service.nothing_is_left()
    found = response.json()
    assert found["object"] == "route"
    assert found["model"] == ("small" if body["model"] == "small" else "large")
    assert found["replica"] in {f"{found['model']}-1", f"{found['model']}-2"}
    assert found["reason"]


async def test_a_dry_run_shows_every_candidate_and_why_others_are_none(serve) -> None:
    service = serve(rules=[RuleConfig(name="sums", use=["small"], pattern=r"\d \+ \d")])
    service.router.fleet.report("small-2", load(running=3, waiting=5, prefill_tokens=700))
    found = (await service.post(path="route", x_latency_class="interactive")).json()
    candidates = {candidate["replica"]: candidate for candidate in found["candidates"]}
    assert set(candidates) == {"large-1", "large-2", "small-1", "small-2"}
    assert [name for name, candidate in candidates.items() if candidate["chosen"]] == [found["replica"]] == ["small-1"]
    busy = candidates["small-2"]
    assert (busy["running"], busy["waiting"], busy["queued_tokens"]) == (3, 5, 700)
    assert busy["ttft_ms"] > candidates["small-1"]["ttft_ms"] > 0
    assert busy["measured"]
    assert busy["excluded"] is None
    assert candidates["large-1"]["excluded"] == "rule 'sums'"
    assert found["latency_class"] == "interactive"
    assert found["targets"] == {"ttft_ms": 1000, "tpot_ms": 100, "refuse_late": False}
    assert found["prompt_tokens"] > 0


async def test_a_dry_run_shows_models_without_a_replica(serve) -> None:
    service = serve()
    service.router.set_replicas("small", [])
    candidates = (await service.post(path="route")).json()["candidates"]
    assert [candidate["model"] for candidate in candidates] == ["large", "large", "small"]
    assert candidates[2]["replica"] is None


async def test_a_dry_run_of_a_bad_request_is_a_bad_request(serve) -> None:
    service = serve()
    assert (await service.post({"model": "auto"}, "route")).status_code == 400
    assert (await service.post(BODY | {"model": "huge"}, "route")).status_code == 404
    assert (await service.post(BODY | {"temperature": 9}, "route")).status_code == 400


# --- a model that is down -----------------------------------------------------------------------------------------


@STREAM
@pytest.mark.parametrize("n", [1, 3])
async def test_the_next_best_answers_for_a_model_that_is_down(serve, stream, n) -> None:
    service = serve()
    service.down("large")
    response = await service.post(BODY | {"stream": stream, "n": n})
    assert response.status_code == 200
    assert answer_of(response, stream).startswith("Paris") if n == 1 else True
    assert set(service.models) == {"large", "small"}
    assert check_header(response)["model"] == "small"
    assert "large: down" in response.headers["x-troupe-route"]
    ids = {request.request_id for request in service.engine.requests}
    assert len(ids) == len(service.engine.requests)


async def test_as_long_as_another_model_could_answer_nobody_waits_for_a_replica(serve) -> None:
    service = serve()
    service.down("large")
    await service.post()
    assert [(model, patient) for model, _, patient in service.engine.asked] == [("large", False), ("small", True)]


async def test_where_no_replica_is_known_at_all_the_best_model_is_waited_for(serve) -> None:
    service = serve()
    for model in ("large", "small"):
        service.router.set_replicas(model, [])
    assert (await service.post()).status_code == 200
    assert service.engine.asked == [("large", None, True)]


@STREAM
async def test_where_all_are_down_the_client_is_told(serve, stream) -> None:
    service = serve()
    service.down("large", "small")
    response = await service.post(BODY | {"stream": stream})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "replica_unavailable"
    assert service.models == ["large", "small"]


@STREAM
async def test_a_named_model_that_is_down_is_not_replaced(serve, stream) -> None:
    service = serve()
    service.down("large")
    assert (await service.post(BODY | {"model": "large", "stream": stream})).status_code == 503
    assert service.models == ["large"]


async def test_once_an_answer_has_begun_no_other_model_goes_on(serve, engine) -> None:
    service = serve()
    engine.error, engine.error_after = ReplicaUnavailable("lost"), 2
    response = await service.post(BODY | {"stream": True})
    assert events(response)[-1]["error"]["code"] == "replica_unavailable"
    assert service.models == ["large"]


@STREAM
@pytest.mark.parametrize(
    ("error", "status"), [(EngineError("died"), 500), (QueueFull("full", retry_after=7), 429), (ValueError("bug"), 500)]
)
async def test_other_errors_are_the_answer(serve, engine, error, status, stream) -> None:
    service = serve()
    engine.error = error
    response = await service.post(BODY | {"stream": stream})
    assert response.status_code == status
    assert service.models == ["large"]


# --- full queues --------------------------------------------------------------------------------------------------


@STREAM
async def test_another_model_that_is_good_enough_answers_for_one_whose_queue_is_full(serve, engine, stream) -> None:
    service = serve(rules=EITHER)
    engine.full = {(await service.post(path="route")).json()["model"]}
    response = await service.post(BODY | {"stream": stream})
    assert response.status_code == 200
    assert len(set(service.models)) == 2
    engine.full = {"large", "small"}
    response = await service.post(BODY | {"stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


@STREAM
@pytest.mark.parametrize("fields", [{}, {"rules": [RuleConfig(name="hard", use=["large"])]}, {"shadow": True}])
async def test_load_alone_does_not_lower_the_quality(serve, engine, stream, fields) -> None:
    service = serve(**fields)
    engine.full = {"large"}
    assert (await service.post(BODY | {"stream": stream})).status_code == 429
    assert service.models == ["large"]


# --- a model that cannot serve the request -----------------------------------------------------------------------


@pytest.fixture
def mute(tmp_path: Path) -> ModelCard:
    """A large model without a chat template."""
    folder = tmp_path / "mute"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return msgspec.structs.replace(CARDS[0], path=str(folder))


async def test_a_model_without_a_chat_template_leaves_chats_to_the_others(serve, mute) -> None:
    service = serve(cards=[mute, CARDS[1]])
    response = await service.post()
    assert response.status_code == 200
    assert check_header(response)["model"] == "small"
    assert "no chat template" in response.headers["x-troupe-route"]
    assert (await service.post(COMPLETION, "completions")).status_code == 200
    assert service.models == ["small", "large"]
    shown = {each["model"]: each["excluded"] for each in (await service.post(path="route")).json()["candidates"]}
    assert shown["small"] is None
    assert "no chat template" in shown["large"]


SHORT = msgspec.structs.replace(CARDS[0], max_model_len=40)
LONG = BODY | {"max_tokens": 60}


async def test_a_model_whose_context_is_too_small_leaves_the_request_to_the_others(serve) -> None:
    service = serve(cards=[SHORT, CARDS[1]])
    response = await service.post(LONG)
    assert check_header(response)["model"] == "small"
    assert "max_tokens = 60: with the prompt of" in response.headers["x-troupe-route"]
    assert check_header(await service.post(BODY | {"max_tokens": 5}))["model"] == "large"
    two = COMPLETION | {"prompt": ["Once", "Once upon a time " * 9], "max_tokens": 5}
    assert check_header(await service.post(two, "completions"))["model"] == "small", "every prompt counts"
    both = await service.post(LONG | {"max_tokens": 300})
    assert both.status_code == 400
    assert both.json()["error"]["param"] == "max_tokens"


async def test_a_model_that_cannot_serve_the_request_is_none_that_could_answer_instead(serve, engine) -> None:
    service = serve(cards=[SHORT, CARDS[1]])
    service.down("small")
    assert (await service.post(LONG)).status_code == 503
    assert engine.asked[0][2], "there is no other, so it is waited for"
    assert service.models == ["small"]


async def test_an_unsure_draft_answers_where_the_better_model_is_down_and_another_too_small(serve, engine) -> None:
    engine.texts, engine.logprob = DRAFTED, -0.6
    cards = [CARDS[0], msgspec.structs.replace(SHORT, name="medium", weight_bytes=5), CARDS[1]]
    service = serve(cards=cards, escalation=EscalationConfig(draft="small", tokens=3, min_logprob=-0.5))
    service.down("large")
    assert answer_of(await service.post(LONG), stream=False) == DRAFTED["small"]
    assert service.models == ["small", "large", "small"]


@pytest.mark.parametrize("fields", [{"stop_token_ids": [1200]}, {"logit_bias": {"1200": 1}}])
async def test_tokens_that_a_model_does_not_have_leave_the_request_to_the_others(serve, fields) -> None:
    service = serve(cards=[msgspec.structs.replace(CARDS[0], vocab_size=1000), CARDS[1]])
    assert check_header(await service.post(BODY | fields))["model"] == "small"


async def test_where_no_model_can_serve_a_request_it_is_a_bad_one(serve, mute) -> None:
    service = serve(cards=[mute, msgspec.structs.replace(mute, name="small")])
    response = await service.post()
    assert response.status_code == 400
    assert "'large' has no chat template" in response.json()["error"]["message"]


async def test_token_ids_go_to_a_model_that_has_them(serve) -> None:
    """Two models with one tokenizer need not have embeddings for the same ids."""
    service = serve(cards=[msgspec.structs.replace(CARDS[0], vocab_size=1000), CARDS[1]])
    for prompt, model in (([5, 1200], "small"), ([5, 900], "large")):
        assert (await service.post(COMPLETION | {"prompt": prompt}, "completions")).status_code == 200
        assert service.models[-1] == model


# --- drafts -------------------------------------------------------------------------------------------------------

DRAFTED = {"small": "The small model thinks that it is four.", "large": "It is four."}


@pytest.fixture
def drafting(serve, engine) -> Service:
    engine.texts = DRAFTED
    return serve(escalation=EscalationConfig(draft="small", tokens=3, min_logprob=-0.5))


@STREAM
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_a_sure_draft_is_the_answer_from_its_first_token_on(drafting, engine, stream, path) -> None:
    if path == "completions":
        body = COMPLETION | {"stream": stream, "max_tokens": 40}
        response = await drafting.post(body, path)
        parts = events(response) if stream else [response.json()]
        text = "".join(choice["text"] for part in parts for choice in part["choices"])
    else:
        response = await drafting.post(BODY | {"stream": stream})
        text = answer_of(response, stream)
    assert text == DRAFTED["small"]
    assert drafting.models == ["small"]
    assert engine.requests[0].sampling.logprobs == 0
    assert check_header(response)["model"] == "small"
    assert "logprob" not in response.text.replace('"logprobs":null', "")


@STREAM
async def test_an_unsure_draft_is_dropped_and_the_better_model_answers(drafting, engine, stream) -> None:
    engine.logprob = -0.6
    response = await drafting.post(BODY | {"stream": stream})
    assert answer_of(response, stream) == DRAFTED["large"]
    assert drafting.models == ["small", "large"]
    assert engine.requests[1].sampling.logprobs is None
    assert "small: its draft looked unsure (mean log-probability -0.60 < -0.5)" in response.headers["x-troupe-route"]
    assert check_header(response)["model"] == "large"


@STREAM
async def test_a_draft_that_is_dropped_is_aborted(drafting, engine, stream) -> None:
    engine.logprob, engine.hold_after = -0.6, 3
    asking = asyncio.create_task(drafting.post(BODY | {"stream": stream}))
    second = await drafting.begun(2)
    assert engine.running == {second}
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


@STREAM
@pytest.mark.parametrize("n", [2, 5])
async def test_several_drafts_are_judged_together(drafting, engine, stream, n) -> None:
    response = await drafting.post(BODY | {"n": n, "stream": stream})
    assert drafting.models == ["small"] * n
    texts = [""] * n
    for part in events(response) if stream else [response.json()]:
        for choice in part["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "") if stream else choice["message"]["content"]
    assert texts == [DRAFTED["small"]] * n
    engine.logprob = -0.6
    assert (await drafting.post(BODY | {"n": n, "stream": stream})).status_code == 200
    assert drafting.models == [*["small"] * 2 * n, *["large"] * n]


@STREAM
async def test_a_draft_shorter_than_what_is_judged_is_an_answer_too(drafting, engine, stream) -> None:
    engine.texts = {"small": "Yes", "large": "No"}
    assert answer_of(await drafting.post(BODY | {"stream": stream}), stream) == "Yes"
    assert drafting.models == ["small"]


async def test_log_probabilities_that_were_asked_for_are_shown(drafting) -> None:
    response = await drafting.post(BODY | {"logprobs": True, "top_logprobs": 2})
    content = response.json()["choices"][0]["logprobs"]["content"]
    assert len(content) == response.json()["usage"]["completion_tokens"]
    assert all(entry["logprob"] == -0.25 and len(entry["top_logprobs"]) == 2 for entry in content)


@STREAM
async def test_usage_counts_every_token_of_a_draft_once(drafting, engine, stream) -> None:
    body = BODY | {"stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
    response = await drafting.post(body)
    usage = (events(response)[-1] if stream else response.json())["usage"]
    assert usage["completion_tokens"] == len(engine.tokens(DRAFTED["small"])) + 1


@STREAM
async def test_a_draft_that_is_down_leaves_the_answer_to_the_better_model(drafting, stream) -> None:
    drafting.down("small")
    assert answer_of(await drafting.post(BODY | {"stream": stream}), stream) == DRAFTED["large"]


@STREAM
async def test_an_unsure_draft_is_better_than_no_answer(drafting, engine, stream) -> None:
    engine.logprob = -0.6
    drafting.down("large")
    response = await drafting.post(BODY | {"stream": stream})
    assert answer_of(response, stream) == DRAFTED["small"]
    assert [(model, patient) for model, _, patient in engine.asked] == [
        ("small", False),
        ("large", False),
        ("small", True),
    ]
    assert engine.requests[2].sampling.logprobs is None
    assert check_header(response)["model"] == "small"
    assert "large: down" in response.headers["x-troupe-route"]


async def test_where_the_unsure_drafts_model_is_down_by_then_the_client_is_told(drafting, engine) -> None:
    engine.logprob = -0.6
    engine.on_request = lambda model: drafting.down("large", "small") if model == "large" else None
    response = await drafting.post()
    assert response.status_code == 503
    assert drafting.models == ["small", "large", "small"]


@STREAM
async def test_a_draft_whose_queue_is_full_leaves_the_answer_to_the_better_model(drafting, engine, stream) -> None:
    engine.full = {"small"}
    response = await drafting.post(BODY | {"stream": stream})
    assert answer_of(response, stream) == DRAFTED["large"]
    assert "small: the queue of 'small' is full" in response.headers["x-troupe-route"]


@STREAM
async def test_load_alone_never_makes_an_unsure_draft_the_answer(drafting, engine, stream) -> None:
    engine.full, engine.logprob = {"large"}, -0.6
    response = await drafting.post(BODY | {"stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    engine.full, engine.logprob = {"large", "small"}, -0.25
    assert (await drafting.post(BODY | {"stream": stream})).status_code == 429


async def test_a_draft_that_would_be_late_leaves_the_answer_to_the_better_model(drafting, engine) -> None:
    for replica in ("small-1", "small-2"):
        drafting.router.fleet.report(replica, load(prefill_tokens=50_000))
    response = await drafting.post(x_ttft_target_ms="500")
    assert response.status_code == 200
    assert drafting.models == ["large"]
    assert "small: its draft would be late" in response.headers["x-troupe-route"]
    for replica in ("large-1", "large-2"):
        drafting.router.fleet.report(replica, load(prefill_tokens=50_000))
    assert (await drafting.post(x_ttft_target_ms="500")).status_code == 429


@STREAM
async def test_a_draft_model_that_was_named_is_not_checked(drafting, engine, stream) -> None:
    engine.logprob = -9.0
    response = await drafting.post(BODY | {"model": "small", "stream": stream})
    assert answer_of(response, stream) == DRAFTED["small"]
    assert engine.requests[0].sampling.logprobs is None


# --- shadow mode --------------------------------------------------------------------------------------------------


async def test_in_shadow_mode_the_header_says_who_would_have_answered(serve) -> None:
    service = serve(shadow=True, rules=[RuleConfig(name="any", use=["small"])])
    found = check_header(await service.post())
    assert (found["model"], found["shadow"]) == ("large", "small")
    assert service.models == ["large"]


# --- sessions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_header", [True, False])
async def test_a_session_is_named_by_header_or_cache_key(serve, by_header) -> None:
    service = serve(rules=EITHER, weights={"switch": 100})
    body, headers = (BODY, {"x_session_id": "s"}) if by_header else (BODY | {"prompt_cache_key": "s"}, {})
    await service.post(body | {"model": "small"}, **headers)
    await service.post(body | {"model": "auto"}, **headers)
    assert service.models == ["small", "small"]
    await service.post(body | {"model": "large"}, **headers)
    await service.post(body | {"model": "auto"}, **headers)
    assert service.models[2:] == ["large", "large"]


async def test_a_session_may_have_any_name(serve) -> None:
    assert (await serve().post(x_session_id="s" * 5000)).status_code == 200


# --- clients that leave -------------------------------------------------------------------------------------------


@asynccontextmanager
async def asking(service: Service, body: dict[str, Any], begun: int) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    task = asyncio.create_task(service.post(body))
    await service.begun(begun)
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@STREAM
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("hold_after", [0, 2, 4])
@pytest.mark.parametrize("draft", [False, True])
async def test_nothing_is_left_when_the_client_leaves(serve, engine, stream, n, hold_after, draft) -> None:
    service = serve(escalation=EscalationConfig(draft="small", tokens=3) if draft else None)
    engine.hold_after = hold_after
    async with asking(service, BODY | {"stream": stream, "n": n}, n):
        await asyncio.sleep(0.01)
        assert len(engine.running) == n
    service.nothing_is_left()


@STREAM
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("turns", range(0, 24, 2))
async def test_a_draft_is_aborted_at_any_moment(serve, engine, stream, n, turns) -> None:
    service = serve(escalation=EscalationConfig(draft="small", tokens=2))
    engine.hold_after = 3
    async with asking(service, BODY | {"stream": stream, "n": n}, 1):
        for _ in range(turns):
            await asyncio.sleep(0)
    service.nothing_is_left()


async def test_while_a_request_runs_it_counts_at_its_replica(serve, engine) -> None:
    service = serve()
    engine.hold_after = 0
    async with asking(service, BODY, 1):
        assert service.router.fleet.num_reserved == 1
        found = (await service.post(path="route")).json()["candidates"]
        assert sorted(candidate["waiting"] for candidate in found if candidate["model"] == "large") == [0, 1]
    service.nothing_is_left()


# --- many at once -------------------------------------------------------------------------------------------------


async def test_a_burst_of_different_prompts_spreads_over_the_replicas(serve, engine) -> None:
    service = serve()
    engine.hold_after = 0
    bodies = [BODY | {"messages": [{"role": "user", "content": f"{number} " * 40}]} for number in range(10)]
    tasks = [asyncio.create_task(service.post(body)) for body in bodies]
    await service.begun(len(bodies))
    assert Counter(replica for _, replica, _ in engine.asked) == {"large-1": 5, "large-2": 5}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
