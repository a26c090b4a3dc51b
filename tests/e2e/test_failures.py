"""What happens when someone leaves: a client, a shard, an ingress."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from .conftest import eventually

if TYPE_CHECKING:
    from .conftest import Application

LONG = {"prompt": "The capital", "temperature": 0, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}


def test_disconnected_client_frees_its_blocks(application: Application) -> None:
    for model in ("large", "large-tp2-pp2"):
        stream = application.openai.completions.create(model=model, stream=True, **LONG)
        for _, _ in zip(range(5), stream, strict=False):
            pass
        (stats,) = application.engine_stats(model)
        assert stats["running"] == 1
        assert stats["blocks_held"] > 0
        before = stats["generated_tokens"]
        stream.close()
        application.assert_idle(model)
        (stats,) = application.engine_stats(model)
        assert stats["generated_tokens"] - before < 1000, "it was stopped, it did not just end"


@pytest.mark.parametrize("victim_process", ["shard", "scheduler"])
def test_killed_process_interrupts_no_stream(application: Application, victim_process: str) -> None:
    """The request goes on where it stopped, on the other replica; the broken one is replaced."""
    model = "large-twice"
    already_warned = len(shard_warnings(application))
    request = {**LONG, "max_tokens": 600}
    undisturbed = application.openai.completions.create(model=model, **request).choices[0].text

    stream = application.openai.completions.create(model=model, stream=True, **request)
    text = ""
    for chunk in stream:
        text += chunk.choices[0].text
        if len(text) > 40:
            break
    victim = next(stats for stats in application.engine_stats(model) if stats["running"])
    survivors = {stats["replica"] for stats in application.engine_stats(model)} - {victim["replica"]}
    if victim_process == "shard":
        os.kill(shard_pids(application, model, victim["replica"])[0], signal.SIGKILL)
    else:
        os.kill(scheduler_pid(application, victim["replica"]), signal.SIGKILL)
    for chunk in stream:
        text += chunk.choices[0].text
        finish = chunk.choices[0].finish_reason
    assert text == undisturbed
    assert finish == "length"

    def replicas() -> set[Any]:
        return {stats["replica"] for stats in application.engine_stats(model)}

    eventually(
        lambda: len(replicas() - survivors - {victim["replica"]}) == 1,
        90,
        lambda: f"no new replica beside {survivors}: {replicas()}",
    )
    application.assert_idle(model)
    warnings = shard_warnings(application)[already_warned:]
    if victim_process == "shard":
        assert len(warnings) == 1, "one line for the user, no more"
        assert warnings[0].startswith(f"{model}: the process of shard 0")


def test_requests_of_a_killed_ingress_are_aborted(application: Application) -> None:
    model = "large-tp2-pp2"
    stream = application.openai.completions.create(model=model, stream=True, **LONG)
    next(iter(stream))
    (stats,) = application.engine_stats(model)
    assert stats["running"] == 1
    before = stats["generated_tokens"]
    (ingress,) = [actor for actor in application.alive_actors() if "Ingress" in (actor.name or "")]
    os.kill(ingress.pid, signal.SIGKILL)
    application.assert_idle(model)
    (stats,) = application.engine_stats(model)
    assert stats["generated_tokens"] - before < 1400, "it was stopped, it did not just end"

    def healthy() -> bool:
        try:
            return application.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    eventually(healthy, 60, lambda: "no new ingress")
    assert application.openai.completions.create(model=model, **{**LONG, "max_tokens": 3}).usage.completion_tokens == 3


def shard_warnings(application: Application) -> list[str]:
    return [line for _, line in application.lines if "ended unexpectedly" in line]


def scheduler_pid(application: Application, replica: str) -> int:
    """The process of a Serve replica."""
    actors = [actor for actor in application.alive_actors() if actor.name and actor.name.endswith(replica)]
    (pid,) = [actor.pid for actor in actors if actor.class_name.startswith("ServeReplica")]
    return pid


def shard_pids(application: Application, model: str, replica: str) -> list[int]:
    """Processes of a replica's shards, by rank."""
    shards = [actor for actor in application.alive_actors() if actor.class_name == "ShardActor"]
    return [pid for name, pid in sorted((s.name, s.pid) for s in shards) if name.startswith(f"{model}:{replica}:")]
