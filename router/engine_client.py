"""What the HTTP face needs of the engine, whichever way it is reached."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from ..cluster.request import EngineRequest, TokenOutput


class TokenStream(Protocol):
    """The outputs of one request; an async generator of them is one."""

    def __aiter__(self) -> AsyncIterator[TokenOutput]: ...

    async def __anext__(self) -> TokenOutput: ...

    async def aclose(self) -> None:
        """Stop; the request is aborted unless its last output was given."""


class EngineClient(Protocol):
    """Runs requests on some replica of a model."""

    def generate(
        self, model: str, request: EngineRequest, replica: str | None = None, *, patient: bool = True
    ) -> TokenStream:
        """Run `request` on `model` and give its tokens as they come; the last output has a finish reason.

        A reader that is slow gets several tokens in one output. Closing the stream aborts the request.

        Args:
            model: the model's name.
            request: what to run.
            replica: that was chosen for it, with a reservation for its first attempt; None: any.
            patient: wait for a replica to come up, or for another one when one is lost before the first token; False:
                raise `ReplicaUnavailable` where no other one is up, so that another model can answer.

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


def attempt_id(request_id: str, attempt: int) -> str:
    """How an attempt to run a request is called on its way to a replica, from 0 on."""
    return f"{request_id}~{attempt}"
