"""Work that is done again and again beside the engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

logger = logging.getLogger("ray.serve")


async def repeat(work: Callable[[], None], seconds: float) -> None:
    """Call `work` now and every `seconds`, until cancelled. A failure is logged once per kind, and the work goes on."""
    seen: set[tuple[type[Exception], str]] = set()
    while True:
        try:
            work()
        except Exception as error:
            kind = (type(error), str(error))
            if kind not in seen and len(seen) < 100:
                seen.add(kind)
                logger.exception("%s failed; it goes on", getattr(work, "__qualname__", work))
        await asyncio.sleep(seconds)
