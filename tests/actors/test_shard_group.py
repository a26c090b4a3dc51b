"""What a user reads about a shard process that Ray found dead."""

from __future__ import annotations

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, OutOfMemoryError

from raytroupe.actors.shard_group import cause_of_death

KILLED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
    "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker."
)


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (KILLED, "Worker unexpectedly exits with a connection error code 2. End of file"),
        (
            "Task was killed due to the node running low on memory.\nMemory on the node was 61.4GB / 64GB.",
            "Task was killed due to the node running low on memory",
        ),
    ],
)
def test_rays_cause_in_one_line(said: str, cause: str) -> None:
    context = ActorDiedErrorContext(error_message=said, actor_id=16 * b"a", class_name="ShardActor", pid=7, name="m:1")
    assert cause_of_death(ActorDiedError(context)) == cause


def test_an_error_without_a_cause() -> None:
    assert cause_of_death(ActorDiedError()) == "The actor died unexpectedly before finishing this task"
    assert cause_of_death(OutOfMemoryError("Out of memory on node n1.")) == "Out of memory on node n1"
