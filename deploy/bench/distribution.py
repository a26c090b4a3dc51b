"""What is reported of many values: mean and percentiles."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

PERCENTILES = (50, 90, 99)


class Distribution(msgspec.Struct, frozen=True):
    """Figures of values in one unit; percentiles are interpolated linearly, as numpy does."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def distribution(values: Sequence[float]) -> Distribution | None:
    """Figures of `values`; None without values."""
    if not len(values):
        return None
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = np.percentile(array, PERCENTILES).tolist()
    return Distribution(len(array), float(array.mean()), p50, p90, p99, float(array.max()))
