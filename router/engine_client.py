"""What the HTTP face needs of the engine, whichever way it is reached."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from ..cluster.request import EngineRequest, TokenOutput


class EngineClient(Protocol):
    """Runs requests on some replica of a model."""

    def generate(self, model: str, request: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        """Run `request` on `model` and yield its tokens as they come; the last output has a finish reason.

        A reader that is slow gets several tokens in one output. Closing the generator aborts the request.

        Raises:
            QueueFull: too many requests wait.
            InvalidRequest: the engine refuses the request.
            ReplicaUnavailable: no replica could finish it.
            EngineError: the engine failed.
        """
        ...

    async def stalled_models(self) -> list[str]:
        """Names of the models of which no replica makes progress; empty when all is well."""
        ...
