"""Views of a buffer's first elements, kept from step to step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from torch import Tensor

KEPT_VIEWS = 16


def leading_views(buffer: Tensor) -> Callable[..., Tensor]:
    """A function from a shape to the first elements of `buffer`, contiguous, in that shape.

    Steps of one size need the same views again and again, and torch takes 6 µs to make one, ten times that between
    kernels that have swept the processor's caches.
    """
    flat = buffer.view(-1)
    return functools.lru_cache(maxsize=KEPT_VIEWS)(lambda *shape: flat[: math.prod(shape)].view(shape))
