"""A histogram for what happens with every token.

Ray's own histogram costs several microseconds per observation, in this process and once more in the node's metrics
agent, which repeats every single one of them at the middle of its bucket. Here an observation is two additions; once
in a while the sums go to Ray as gauges with the names and labels that Prometheus gives the series of a histogram, so
that `histogram_quantile(0.9, rate(…_bucket[1m]))` finds what it expects, and `…_sum` is exact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from ray.util.metrics import Gauge


class TokenHistogram:
    """Counts values by bucket, one series for each combination of labels. Use it in one thread."""

    def __init__(
        self,
        name: str,
        description: str,
        boundaries: Sequence[float],
        label_names: tuple[str, ...],
        default_tags: dict[str, str],
    ) -> None:
        """Begin with no series; one for each combination of labels appears with its first value.

        Args:
            name: of the metric, without the `ray_` that Ray puts before it.
            description: for its help text.
            boundaries: upper ends of the buckets, ascending; values above the last have a bucket, too.
            label_names: of the labels that come with each value.
            default_tags: further labels, of every series.
        """
        self._boundaries = list(boundaries)
        self._labels = [*(format(boundary, "g") for boundary in boundaries), "+Inf"]
        self._label_names = label_names
        self._tags = default_tags
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        keys = (*label_names, *default_tags)
        self._bucket = Gauge(f"{name}_bucket", f"{description} Cumulative, by upper end.", (*keys, "le"))
        self._count = Gauge(f"{name}_count", f"{description} Number of values.", keys)
        self._sum = Gauge(f"{name}_sum", f"{description} Sum of the values.", keys)

    def observe(self, value: float, labels: tuple[str, ...]) -> None:
        """Count one value, with a label for each of `label_names`."""
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._counts[labels] = [0] * len(self._labels)
            self._sums[labels] = 0.0
        counts[bisect_left(self._boundaries, value)] += 1
        self._sums[labels] += value

    def publish(self) -> None:
        """Hand the totals to Ray. Series that are not published for a minute disappear, so call it on a timer."""
        for labels, counts in self._counts.items():
            tags = {**dict(zip(self._label_names, labels, strict=True)), **self._tags}
            for label, total in zip(self._labels, accumulate(counts), strict=True):
                self._bucket.set(total, {**tags, "le": label})
            self._count.set(sum(counts), tags)
            self._sum.set(self._sums[labels], tags)
