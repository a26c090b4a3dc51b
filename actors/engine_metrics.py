"""The engine's figures as Ray metrics, named after vLLM's; they appear at every node's Prometheus endpoint.

The engine counts for itself (`cluster/scheduler_stats.py`); this class looks now and then and passes on what has
changed, so that no step pays for metrics. Ray puts `ray_` before each name.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from ..cluster.request import FinishReason
from ..cluster.scheduler_stats import RequestTimes, SchedulerSnapshot

_TAGS = ("model_name", "replica")
_CLASS_TAG = "latency_class"
_QUEUE_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0]

_COUNTERS = {
    "prefix_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "preemptions": ("num_preemptions", "Running requests that gave their blocks back and are computed again."),
    "refused_late": ("requests_refused_late", "Requests refused since their first token could not come in time."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted requests."),
    "generated_tokens": ("generation_tokens", "Tokens generated."),
}
"""Field of `SchedulerSnapshot` → metric."""


class StepTotals:
    """Steps and their time since start, in seconds."""

    def __init__(self) -> None:
        self.steps = 0
        self.model_seconds = 0.0
        self.shard_seconds = 0.0


class EngineMetrics:
    """Publishes one replica's figures."""

    def __init__(self, model: str, replica: str) -> None:
        self._tags = {"model_name": model, "replica": replica}
        self._published: dict[str, float] = {}
        self._running = self._gauge("num_requests_running", "Requests that hold KV blocks.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for blocks or a place in the batch.")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of the KV blocks that requests hold, 0 to 1.")
        self._counters = {field: self._counter(*text) for field, text in _COUNTERS.items()}
        self._steps = self._counter("engine_steps", "Engine steps.")
        self._model_seconds = self._counter("step_model_seconds", "Time in forward passes and sampling.")
        self._shard_seconds = self._counter("step_shard_seconds", "The same, with building the inputs.")
        self._queue_time = Histogram(
            "troupe_request_queue_time_seconds",
            "From a request's arrival at the scheduler to its first step.",
            boundaries=_QUEUE_SECONDS,
            tag_keys=(*_TAGS, _CLASS_TAG),
        ).set_default_tags(self._tags)
        self._finished = self._counter_by_class("requests_finished", "Requests served to their end.")
        self._within_target = self._counter_by_class(
            "requests_within_target", "Those whose first token and time per token met the targets of their class."
        )

    def publish(self, snapshot: SchedulerSnapshot, finished: list[RequestTimes], totals: StepTotals) -> None:
        """Pass on the state of this moment and what has been counted since the last call."""
        self._running.set(snapshot.running)
        self._waiting.set(snapshot.waiting)
        self._usage.set(snapshot.blocks_held / snapshot.blocks_total)
        for field, counter in self._counters.items():
            self._advance(field, counter, getattr(snapshot, field))
        self._advance("steps", self._steps, totals.steps)
        self._advance("model_seconds", self._model_seconds, totals.model_seconds)
        self._advance("shard_seconds", self._shard_seconds, totals.shard_seconds)
        for request in finished:
            tags = {_CLASS_TAG: request.latency_class}
            if request.queued is not None:
                self._queue_time.observe(request.queued, tags)
            if request.finish_reason is not FinishReason.ABORT:
                self._finished.inc(1, tags)
                if request.within_target:
                    self._within_target.inc(1, tags)

    def _advance(self, name: str, counter: Counter, total: float) -> None:
        """Bring a counter to `total`."""
        before = self._published.get(name)
        if before is None:
            # `inc` refuses 0, but a series that appears with its first event looks like missing data until then.
            counter._record(0.0)
        if total > (before or 0.0):
            counter.inc(total - (before or 0.0))
        self._published[name] = total

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(f"troupe_{name}", description, tag_keys=_TAGS).set_default_tags(self._tags)

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(f"troupe_{name}", description, tag_keys=_TAGS).set_default_tags(self._tags)

    def _counter_by_class(self, name: str, description: str) -> Counter:
        return Counter(f"troupe_{name}", description, tag_keys=(*_TAGS, _CLASS_TAG)).set_default_tags(self._tags)
