"""The scheduler actor: a Serve replica around the engine of one model.

One unary Serve call per request is its control: it lasts as long as the request, and cancelling it aborts the request.
The tokens leave over ZeroMQ (`actors/token_sender.py`), the steps go to the shards over ZeroMQ (`actors/channel.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec
import ray
from ray import serve

from ..cluster.autoscaling import replica_metrics
from ..cluster.cpu_affinity import keep_off_shards, plan_this_node
from ..cluster.errors import EngineError, ShardFailed
from ..cluster.kv_memory import KVMemory
from ..cluster.messages import GenerateCall, SubscribeCall
from ..cluster.queue_time import queue_seconds
from ..cluster.request import TokenOutput
from ..cluster.scheduler import Scheduler
from ..cluster.startup import describe_startup
from ..cluster.step import StepResult
from ..cluster.utilisation import UtilisationMeter
from .control_calls import ControlCalls
from .engine_loop import EngineLoop
from .engine_metrics import EngineMetrics, StepTotals
from .load_reporter import HEARTBEAT_SECONDS, LoadReporter
from .repetition import repeat
from .replica_settings import ReplicaSettings
from .reporter import Reporter
from .shard_group import ShardGroup, describe_cpus
from .token_sender import FEW_OUTPUTS, MESSAGE_SECONDS, PATIENT_SECONDS, TokenSender

logger = logging.getLogger("ray.serve")

METRICS_SECONDS = 1.0
WATCH_SECONDS = 0.5
"""Between looks at which ingresses are still there."""
STALL_SECONDS = 600.0
"""Work in the queue and no result for so long: the engine hangs. A step of a large model may take minutes on a CPU, and
this is the last resort only: a process that ends or a step that raises is noticed at once."""
GOODBYE_SECONDS = 0.5
"""Between telling all callers that the engine failed and ending the process, for the replies to get away."""


class SchedulerReplica:
    """Serves one model with one group of shards."""

    async def __init__(self, settings: ReplicaSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        began = time.monotonic()
        self._settings = settings
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._reporter = Reporter(settings.listener, settings.name, self._replica)
        self._decoder = msgspec.msgpack.Decoder(GenerateCall)
        self._encoder = msgspec.msgpack.Encoder()
        self._calls: ControlCalls | None = None
        self._failure: EngineError | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._sender = TokenSender(interval_s=MESSAGE_SECONDS, patient_s=PATIENT_SECONDS, few_outputs=FEW_OUTPUTS)
        if settings.device == "cpu":
            keep_off_shards(plan_this_node(shards=settings.shards_per_node, num_threads=settings.num_threads))
        group = ray.util.get_current_placement_group()
        assert group is not None, "the deployment has placement group bundles"
        self._shards = ShardGroup(settings, self._replica, group)
        try:
            memory = await self._prepare_shards(began)
            self._executor = await self._shards.serve(self._on_shard_death)
        except Exception as error:
            self._reporter.start_failed(error)
            self._shards.kill()
            self._reporter.close()
            raise
        self._start_engine(memory)

    # --- what Serve calls -----------------------------------------------------------------------------------------

    async def generate(self, payload: bytes) -> bytes:
        """Serve one request: `GenerateCall` in, `GenerateReply` out when it has ended, both msgpack."""
        assert self._calls is not None, "the engine starts before Serve calls"
        call = self._decoder.decode(payload)
        self._load_reporter.accept(call.request.request_id)
        asyncio.get_running_loop().call_soon(self._load_reporter.publish)  # when it is in the scheduler
        try:
            return self._encoder.encode(await self._calls.serve(call))
        finally:
            self._load_reporter.publish()

    async def subscribe(self, payload: bytes) -> bytes:
        """Report as this `SubscribeCall` (msgpack) says, from now on; returns the replica's name."""
        self._load_reporter.subscribe(msgspec.msgpack.decode(payload, type=SubscribeCall).reports_to)
        return self._replica.encode()

    async def engine_stats(self) -> dict[str, object]:
        """The scheduler's snapshot, the replica's name and whether the engine's invariants hold (None or the fault)."""
        try:
            self._scheduler.check_integrity()
            fault = None
        except AssertionError as error:
            fault = str(error)
        return {"replica": self._replica, "fault": fault, **msgspec.to_builtins(self._scheduler.snapshot())}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy decides from (`cluster/autoscaling.py`). Serve asks every second or so."""
        load, totals = self._scheduler.load(), self._scheduler.stats
        utilisation = self._utilisation.measure(
            load,
            computed_tokens=totals.prompt_tokens - totals.prefix_hits,
            generated_tokens=totals.generated_tokens,
            now=time.monotonic(),
        )
        return replica_metrics(queue_seconds(load), utilisation)

    async def check_health(self) -> None:
        """Healthy means that steps make progress.

        Raises:
            EngineError: the engine failed, or work waits and nothing has come back for `STALL_SECONDS`.
        """
        if self._failure is not None:
            raise self._failure
        idle = time.monotonic() - self._engine.last_progress
        if self._scheduler.has_work and idle > STALL_SECONDS:
            raise EngineError(f"{self._settings.name}: no step has ended for {idle:.0f} s")

    async def __del__(self) -> None:
        """Graceful shutdown: Serve calls it when no request is left, or the grace time is over."""
        for task in self._tasks:
            task.cancel()
        self._executor.close()
        self._shards.kill()
        self._sender.close()
        self._load_reporter.close()
        self._reporter.close()

    # --- start ----------------------------------------------------------------------------------------------------

    async def _prepare_shards(self, began: float) -> KVMemory:
        """Load the weights and allocate the KV cache; the size that was decided. What the start took is reported from
        `began` on, by `time.monotonic()`."""
        settings = self._settings
        reports = await self._shards.load()
        memory = settings.plan_kv_memory(
            [report.memory for report in reports], max(report.kv_block_bytes for report in reports)
        )
        seconds = await self._shards.allocate(memory.num_blocks)
        self._reporter.notice(memory.reasoning)
        self._reporter.notice(f"{len(reports)} {settings.device} shard(s) in {reports[0].dtype}")
        for line in describe_cpus([report.cpus for report in reports]):
            self._reporter.notice(line)
        self._reporter.notice(describe_startup(seconds, time.monotonic() - began))
        return memory

    def _start_engine(self, memory: KVMemory) -> None:
        settings = self._settings
        self._scheduler = Scheduler(settings.scheduler_config(memory.num_blocks))
        self._totals = StepTotals()
        self._utilisation = UtilisationMeter()
        self._engine = EngineLoop(self._scheduler, self._executor, self._publish, self._observe)
        self._calls = ControlCalls(self._engine, self._sender)
        self._load_reporter = LoadReporter(settings.name, self._replica, self._scheduler.kv.pool, self._scheduler.load)
        metrics = EngineMetrics(settings.name, self._replica)

        def publish_metrics() -> None:
            metrics.publish(self._scheduler.snapshot(), self._scheduler.stats.drain_finished(), self._totals)

        self._tasks = [
            asyncio.create_task(self._run()),
            asyncio.create_task(repeat(publish_metrics, METRICS_SECONDS)),
            asyncio.create_task(repeat(self._calls.abort_orphans, WATCH_SECONDS)),
            asyncio.create_task(repeat(self._load_reporter.watch, HEARTBEAT_SECONDS)),
        ]

    # --- running --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._engine.run()
        except ShardFailed as error:
            await self._fail(error)
        except Exception as error:  # a bug of ours; the replica is replaced like one whose shard died
            logger.exception("the engine loop of %s raised", self._settings.name)
            await self._fail(
                EngineError(f"the engine of {self._settings.name} failed: {type(error).__name__}: {error}")
            )

    def _publish(self, outputs: list[TokenOutput]) -> None:
        assert self._calls is not None, "it is made with the engine"
        self._calls.publish(outputs)

    def _observe(self, result: StepResult) -> None:
        self._totals.steps += 1
        self._totals.model_seconds += result.model_seconds
        self._totals.shard_seconds += result.total_seconds
        self._load_reporter.publish()

    # --- failure --------------------------------------------------------------------------------------------------

    def _on_shard_death(self, failure: ShardFailed) -> None:
        """A shard died, perhaps while no step was under way."""
        self._tasks.append(asyncio.create_task(self._fail(failure)))

    async def _fail(self, error: EngineError) -> None:
        """End every request with `error`, then this process: Serve notices a death at once and starts another replica,
        while it would believe three failed health checks only."""
        if self._failure is not None:
            return
        self._failure = error
        self._reporter.notice(f"{error}; the replica is replaced", warning=True)
        if self._calls is not None:  # else a shard died while the replica started
            self._calls.fail(error)
        self._shards.kill()
        await asyncio.sleep(GOODBYE_SECONDS)
        self._reporter.close()
        ray.kill(ray.get_runtime_context().current_actor)
