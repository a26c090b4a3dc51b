"""What the ingress measures of every request, published through Ray's metrics and named after vLLM's.

Ray's agents put `ray_` before each name: the first one appears as `ray_troupe_time_to_first_token_seconds`.
"""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Histogram

from ..cluster.latency_class import LatencyTargets
from .token_histogram import TokenHistogram

_TAGS = ("model_name", "latency_class", "replica")
_LATENCY_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0]
_TOKEN_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5]


class IngressMetrics:
    """The ingress's histograms and counters; `replica` is the ingress's own Serve replica."""

    def __init__(self, replica: str = "") -> None:
        def histogram(name: str, description: str, boundaries: list[float]) -> Histogram:
            found = Histogram(f"troupe_{name}", description, boundaries=boundaries, tag_keys=_TAGS)
            return found.set_default_tags({"replica": replica})

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds",
            "From a request's arrival at the ingress to its first token.",
            _LATENCY_SECONDS,
        )
        self.inter_token_latency = TokenHistogram(
            "troupe_inter_token_latency_seconds",
            "Time between tokens of a choice, as the ingress sees them.",
            _TOKEN_SECONDS,
            ("model_name", "latency_class"),
            {"replica": replica},
        )
        self.e2e_latency = histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival at the ingress to its last token.",
            _LATENCY_SECONDS,
        )
        self.success = Counter(
            "troupe_request_success",
            "Choices that ended normally, by reason.",
            tag_keys=(*_TAGS, "finished_reason"),
        ).set_default_tags({"replica": replica})
        self.within_targets = Counter(
            "troupe_request_within_targets",
            "Requests that ended normally within the targets of their latency class: the goodput.",
            tag_keys=_TAGS,
        ).set_default_tags({"replica": replica})
        self.refused = Counter(
            "troupe_request_refused",
            "Requests that were refused because of load, by code (queue_full, target_unreachable).",
            tag_keys=("latency_class", "replica", "code"),
        ).set_default_tags({"replica": replica})

    def publish(self) -> None:
        """Hand over what is counted here and not by Ray. Call it about once a second."""
        self.inter_token_latency.publish()


class RequestTimer:
    """Takes the times of one request; one object per HTTP request and model that it is tried on."""

    def __init__(
        self, metrics: IngressMetrics, model: str, latency: LatencyTargets, choices: int = 1, began: float | None = None
    ) -> None:
        """Time a request for `choices` answers of `model`, which came at `began` (`time.perf_counter`), or now."""
        self._metrics = metrics
        self._latency = latency
        self._labels = (model, latency.name)
        self._tags = {"model_name": model, "latency_class": latency.name}
        self._began = time.perf_counter() if began is None else began
        self._last: dict[int, float] = {}
        self._first = 0.0
        self._tokens = 0
        self._running = choices

    def update(self, choice: int, tokens: int, finish_reason: str | None) -> None:
        """A choice has gained `tokens` tokens, and has ended if there is a reason."""
        self.tokens(choice, tokens)
        if finish_reason is not None:
            self.choice_finished(finish_reason)
            self._running -= 1
            if not self._running:
                self.finished()

    def tokens(self, choice: int, count: int) -> None:
        """`count` tokens of a choice have arrived together."""
        if count == 0:
            return
        now = time.perf_counter()
        if (last := self._last.get(choice)) is not None:
            self._metrics.inter_token_latency.observe((now - last) / count, self._labels)
            self._tokens += count
        elif not self._last:
            self._first = now
            self._metrics.time_to_first_token.observe(now - self._began, self._tags)
        self._last[choice] = now

    def choice_finished(self, reason: str) -> None:
        """A choice has ended."""
        self._metrics.success.inc(1, {**self._tags, "finished_reason": reason})

    def finished(self) -> None:
        """All choices have ended."""
        now = time.perf_counter()
        self._metrics.e2e_latency.observe(now - self._began, self._tags)
        per_token = (now - self._first) * len(self._last) / self._tokens if self._tokens else 0.0
        if self._last and self._first - self._began <= self._latency.ttft and per_token <= self._latency.tpot:
            self._metrics.within_targets.inc(1, self._tags)
