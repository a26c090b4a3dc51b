"""One running application for all end-to-end tests, started the way a user does: `troupe serve --config FILE`.

large            demo-large, 1 shard       the reference
small            demo-small, short queue   small enough to fill
large-tp2-pp2    demo-large, 4 shards      the same answers, divided
large-twice      demo-large, 2 replicas    one of them is killed
pair             large and small           the router chooses
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import yaml
from ray import serve
from ray.util.state import list_actors
from ray.util.state.common import ActorState

from raytroupe.deploy.bench.serve_process import ServeProcess

DEMO_MODELS = Path(__file__).parents[2] / "deploy" / "demo_models"

# float32 everywhere: the order of additions must not decide between two tokens.
MODELS = [
    {"model": "demo-large", "served_model_name": "large"},
    {"model": "demo-small", "served_model_name": "small", "max_num_seqs": 2, "max_num_waiting": 2},
    {
        "model": "demo-large",
        "served_model_name": "large-tp2-pp2",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
    },
    {"model": "demo-large", "served_model_name": "large-twice", "replicas": 2},
]
ROUTER = {
    "groups": {"pair": ["large", "small"]},
    "rules": [{"name": "easy", "pattern": "capital", "use": ["small"]}],
}
NAMES = [model["served_model_name"] for model in MODELS]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:ray.*")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("cluster")


class Application:
    """The running application and its cluster, seen from outside and from inside."""

    def __init__(self, server: ServeProcess, cluster: str) -> None:
        self.address = server.address
        self.cluster = cluster
        self.lines = server.lines
        self.http = httpx.Client(base_url=server.address, timeout=120)
        self.openai = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=120)

    def answer(self, model: str, question: str, **fields: Any) -> str:
        """The greedy answer to one question."""
        messages = [{"role": "user", "content": question}]
        reply = self.openai.chat.completions.create(model=model, messages=messages, temperature=0, **fields)
        return reply.choices[0].message.content

    def engine_stats(self, model: str) -> list[dict[str, Any]]:
        """`SchedulerReplica.engine_stats` of every replica; a moment after one has died, Serve may still name it."""
        handle = serve.get_deployment_handle(model, "troupe")
        deadline = time.monotonic() + 60
        while True:
            try:
                return handle.broadcast("engine_stats").results(timeout_s=30)
            except ray.exceptions.RayActorError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def alive_actors(self) -> list[ActorState]:
        """All actors of the cluster that are alive."""
        return list_actors(address=self.cluster, filters=[("state", "=", "ALIVE")], limit=1000)

    def assert_idle(self, model: str) -> None:
        """No request, no block in use, all invariants hold, within a moment."""

        def idle() -> bool:
            stats = self.engine_stats(model)
            return all(one["running"] == one["waiting"] == one["blocks_held"] == 0 for one in stats)

        eventually(idle, 10, lambda: f"{model} is not idle: {self.engine_stats(model)}")
        assert [one["fault"] for one in self.engine_stats(model) if one["fault"]] == []


def eventually(condition: Callable[[], bool], seconds: float, complaint: Callable[[], str]) -> None:
    """Wait for a condition that must become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.05)


@pytest.fixture(scope="session")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    models = [
        {**model, "model": str(DEMO_MODELS / model["model"]), "dtype": "float32", "kv_cache_memory": "48MiB"}
        for model in MODELS
    ]
    file = tmp_path_factory.mktemp("config") / "models.yaml"
    file.write_text(yaml.safe_dump({"models": models, "router": ROUTER}))
    with ServeProcess("--config", str(file)) as server:
        eventually(lambda: any("Ctrl-C" in line for _, line in server.lines), 30, lambda: str(server.lines))
        output = "\n".join(line for _, line in server.lines)
        cluster = re.search(r"^Ray +(\S+:\d+)", output, re.MULTILINE)
        assert cluster, output
        ray.init(address=cluster[1], log_to_driver=False, logging_level="ERROR")
        try:
            yield Application(server, cluster[1])
        finally:
            ray.shutdown()
