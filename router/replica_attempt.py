"""One attempt to run a request on one replica: its control call, and the mailbox that its tokens come to."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import msgspec
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ..cluster import errors
from ..cluster.messages import GenerateCall, GenerateReply
from ..cluster.request import EngineRequest, TokenOutput
from .token_receiver import TokenReceiver

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(GenerateReply).decode


class ReplicaLost(Exception):
    """The replica cannot finish the request, but another one can."""


class ReplicaStepFailed(ReplicaLost):
    """The replica raised while it computed the request, which may be the cause."""


class ReplicaAttempt:
    """A request that has been sent to a replica. Call `close` in any case."""

    def __init__(
        self,
        handle: DeploymentHandle,
        receiver: TokenReceiver,
        request: EngineRequest,
        straggler_timeout_s: float,
        replica: str | None = None,
    ) -> None:
        """Send `request` to `replica`, or any other one, behind `handle`; its tokens come to `receiver`.

        Tokens may still be on their way for `straggler_timeout_s` after the control call has returned.
        """
        self._lease = receiver.open(request.request_id, len(request.generated))
        self.mailbox = self._lease.__enter__()
        self._straggler_timeout_s = straggler_timeout_s
        self.replica = replica
        payload = _encode(GenerateCall(request=request, reply_to=receiver.endpoint, target=replica or ""))
        # Serve keys a call by the HTTP request that it was made for, and loses track of a second one under the same
        # key. An empty context gives every choice its own.
        self._response = contextvars.Context().run(handle.generate.remote, payload)
        self._control = asyncio.create_task(self._watch())

    async def accepted(self, model: str, deadline: float) -> TokenOutput | None:
        """The first output, which says that a replica has the request.

        Raises:
            ReplicaUnavailable: none came before `deadline` (loop time).
        """
        try:
            async with asyncio.timeout_at(deadline):
                return await self.mailbox.get()
        except TimeoutError:
            raise errors.ReplicaUnavailable(
                f"no replica of {model!r} has accepted the request in time; try again later"
            ) from None

    async def close(self, *, finished: bool) -> None:
        """Forget the request; unless it has `finished`, the replica shall, too."""
        self._lease.__exit__(None, None, None)
        if not finished:
            self._response.cancel()
        self._control.cancel()
        await asyncio.gather(self._control, return_exceptions=True)

    async def _watch(self) -> None:
        """Wait for the end of the control call and close the mailbox with what it says."""
        mailbox, response = self.mailbox, self._response
        try:
            reply = _decode(await response)
        except asyncio.CancelledError:
            mailbox.close(ReplicaLost("cancelled"))
            raise
        except RayTaskError as error:
            mailbox.close(errors.EngineError(f"generate() failed on the replica: {error.cause!r}"))
        except BackPressureError as error:
            mailbox.close(errors.QueueFull(str(error)))
        except DeploymentUnavailableError as error:
            mailbox.close(errors.ReplicaUnavailable(str(error)))
        except RayError as error:
            # The actor, its worker or its node died, or the replica was taken down before the request was done.
            mailbox.close(ReplicaLost(type(error).__name__))
        except Exception as error:
            mailbox.close(error)
        else:
            if reply.error is not None:
                mailbox.close(_error_of(reply))
                return
            await asyncio.sleep(self._straggler_timeout_s)
            mailbox.close()


def _error_of(reply: GenerateReply) -> Exception:
    """The exception that a replica's reply stands for."""
    message = reply.error or ""
    kind: Any = getattr(errors, reply.error_kind or "", None)
    if isinstance(kind, type) and issubclass(kind, errors.QueueFull):
        return kind(message, retry_after=reply.retry_after)
    if kind is errors.EngineError or kind is errors.StepFailed:
        return ReplicaStepFailed(message)
    if isinstance(kind, type) and issubclass(kind, errors.EngineError | errors.ReplicaUnavailable):
        return ReplicaLost(message)
    if isinstance(kind, type) and issubclass(kind, errors.RequestError):
        return kind(message)
    return errors.EngineError(message)
