"""A small model drafts the first tokens unseen; if it looks unsure of them, a better model answers instead."""

from __future__ import annotations

from collections import deque
from typing import Self

from ..cluster.errors import TroupeError
from ..cluster.router_config import EscalationConfig
from .generation import Choice, Delta, Updates


class DraftUnsure(TroupeError):
    """The mean log-probability of the drafted tokens is too low."""


class Escalation:
    """Reads the beginning of an answer and judges it."""

    def __init__(self, config: EscalationConfig) -> None:
        self._config = config

    async def check(self, updates: Updates) -> Updates:
        """The same updates, once the first tokens are there and look sure enough.

        Args:
            updates: of one or several choices with log-probabilities; all are judged together.

        Raises:
            DraftUnsure: they do not; `updates` is closed.
        """
        kept: list[tuple[Choice, Delta]] = []
        logprobs: list[float] = []
        try:
            async for update in updates:
                kept.append(update)
                logprobs += [chance.logprobs.chosen for chance in update[1].chances]
                if len(logprobs) >= self._config.tokens:
                    break
            mean = sum(logprobs) / len(logprobs) if logprobs else 0.0
            if mean < self._config.min_logprob:
                raise DraftUnsure(
                    f"its draft looked unsure (mean log-probability {mean:.2f} < {self._config.min_logprob:g})"
                )
        except BaseException:
            await updates.aclose()
            raise
        return _Replayed(kept, updates)


class _Replayed:
    """Updates of which the first have been read already."""

    def __init__(self, first: list[tuple[Choice, Delta]], rest: Updates) -> None:
        self._first = deque(first)
        self._rest = rest

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Choice, Delta]:
        if self._first:
            return self._first.popleft()
        return await anext(self._rest)

    async def aclose(self) -> None:
        await self._rest.aclose()
