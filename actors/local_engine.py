"""The whole engine in one process, without Ray and without ZeroMQ: for tests, benchmarks and notebooks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from ..cluster.config import ModelConfig, load_config
from ..cluster.cpu_affinity import plan_this_node
from ..cluster.errors import ConfigError
from ..cluster.kv_memory import KVMemory
from ..cluster.model_spec import load_spec
from ..cluster.request import EngineRequest, FinishReason, SamplingParams, TokenLogprobs, TokenOutput
from ..cluster.scheduler import Scheduler
from ..cluster.startup import IMPORTS, StartupClock, describe_startup
from ..cluster.step import StepResult
from ..cluster.topology import ShardLayout
from .engine_loop import EngineLoop
from .executor import Executor, LocalExecutor
from .openmp import import_torch
from .replica_settings import ReplicaSettings

if TYPE_CHECKING:
    from .shard import Shard

logger = logging.getLogger(__name__)


class Completion(msgspec.Struct):
    """All that the engine answered to one request."""

    request_id: str
    tokens: list[int] = []
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = []
    """One per token if asked for."""
    cached_tokens: int = 0


class LocalEngine:
    """One model on one device of this process.

        with LocalEngine("deploy/demo_models/demo-large", dtype="float32") as engine:
            (answer,) = engine.generate([[1, 4, 60, 6, 5]], SamplingParams(temperature=0, max_tokens=20))

    Args:
        model: folder in Hugging Face format.
        num_blocks: blocks of the KV cache; default: decided from the free memory, as `memory` says.
        fields: fields of `ModelConfig`.
    """

    def __init__(self, model: str | Path, *, num_blocks: int | None = None, **fields: Any) -> None:
        config = load_config({"models": [{"model": str(model), **fields}]}).models[0]
        if config.shards_per_replica * config.replicas > 1:
            raise ConfigError(
                f"tensor_parallel_size × pipeline_parallel_size × replicas = "
                f"{config.shards_per_replica * config.replicas}: the local engine has one shard; serve on Ray for more"
            )
        # OpenMP keeps a team for every thread that has computed, and when teams have more threads than there are cores,
        # none of them waits awake any more, which costs a decode step a tenth. This thread's ends with it.
        with ThreadPoolExecutor(1, "load") as loading:
            self.shard, self.memory, self.scheduler = loading.submit(_start, Path(model), config, num_blocks).result()
        self.observe: Callable[[StepResult], None] | None = None
        """Called with the result of every step, after the scheduler has taken it in."""
        self._executor = LocalExecutor(self.shard.launch)
        self._requests = 0

    def generate(
        self, prompts: Iterable[list[int]], sampling: SamplingParams | Iterable[SamplingParams]
    ) -> list[Completion]:
        """Answer prompts of token ids together; completions in the order of the prompts.

        Raises:
            InvalidRequest: a prompt is empty or does not fit the context. QueueFull: too many at once.
        """
        prompts = list(prompts)
        choices = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        requests = []
        for prompt, params in zip(prompts, choices, strict=True):
            self._requests += 1
            requests.append(EngineRequest(request_id=f"local-{self._requests}", prompt=prompt, sampling=params))
        return self.answer(requests)

    def answer(self, requests: list[EngineRequest]) -> list[Completion]:
        """Answer whole requests together; raises as `generate` does."""
        return asyncio.run(answer_all(self.scheduler, self._executor, requests, self.observe))

    def close(self) -> None:
        """End the thread and free the memory."""
        self._executor.close()
        self.shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start(model: Path, config: ModelConfig, num_blocks: int | None) -> tuple[Shard, KVMemory | None, Scheduler]:
    """Load a model; what was decided about memory is None if it was given."""
    began = time.perf_counter()
    spec = load_spec(model)
    max_model_len = config.max_model_len or spec.max_position_embeddings
    settings = ReplicaSettings.of(config, folder=model, device=config.device, max_model_len=max_model_len)
    layout = ShardLayout()
    plan = plan_this_node(shards=1, num_threads=config.num_threads, alone=True)
    logger.info("%s: %s", config.name, plan.explain(None))
    clock = StartupClock()
    with clock.phase(IMPORTS):
        import_torch(plan)
        from .shard import Shard  # with torch, which reads what OpenMP is told but once

    shard = Shard(settings.shard_config(layout, plan.threads), clock)
    shard.connect()
    shard.load()
    memory = None
    if num_blocks is None:
        bytes_per_block = settings.kv_bytes_per_block(spec, layout, shard.dtype.itemsize)
        memory = settings.plan_kv_memory([shard.memory()], bytes_per_block)
        num_blocks = memory.num_blocks
        logger.info("%s: %s", config.name, memory.reasoning)
    shard.allocate(num_blocks)
    logger.info("%s: %s", config.name, describe_startup(clock.seconds, time.perf_counter() - began))
    return shard, memory, Scheduler(settings.scheduler_config(num_blocks))


async def answer_all(
    scheduler: Scheduler,
    executor: Executor,
    requests: list[EngineRequest],
    observe: Callable[[StepResult], None] | None = None,
) -> list[Completion]:
    """Run the engine loop until all `requests` are answered; `observe` is called with the result of every step.

    Raises:
        RequestError: one cannot be queued; all are aborted. ShardFailed: from the executor.
    """
    completions = {request.request_id: Completion(request.request_id) for request in requests}
    unfinished = set(completions)
    done = asyncio.Event()

    def collect(outputs: list[TokenOutput]) -> None:
        for output in outputs:
            completion = completions[output.request_id]
            completion.tokens += output.tokens
            completion.logprobs += output.logprobs or []
            completion.cached_tokens = max(completion.cached_tokens, output.cached_tokens)
            if output.finish_reason is not None:
                completion.finish_reason = output.finish_reason
                unfinished.discard(output.request_id)
        if not unfinished:
            done.set()

    loop = EngineLoop(scheduler, executor, collect, observe)
    try:
        for request in requests:
            loop.add(request)
        running = asyncio.ensure_future(loop.run())
        finished = asyncio.ensure_future(done.wait())
        if requests:
            await asyncio.wait([running, finished], return_when=asyncio.FIRST_COMPLETED)
        finished.cancel()
        if running.done():
            running.result()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        while scheduler.num_in_flight:  # computed beyond the end of the last requests
            scheduler.update(await executor.result())
    finally:
        for request in requests:
            scheduler.abort(request.request_id)
    return list(completions.values())
