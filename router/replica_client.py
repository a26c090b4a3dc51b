"""The engine as the ingress reaches it in a cluster: control through a Ray Serve handle, tokens through ZeroMQ.

For every request one unary handle call lives as long as the request. Serve sees it as load, drains it, cancels it,
and its failure tells that the replica died. The tokens come to the `TokenReceiver`. When a replica dies, the prompt
and the tokens so far go to another one, which goes on where the first stopped: the random number of a token depends
on seed and position only, so the client cannot tell.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ..cluster import errors
from ..cluster.messages import GenerateCall, GenerateReply
from ..cluster.request import EngineRequest, TokenOutput
from .token_receiver import Mailbox, TokenReceiver, TokensMissing

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 1
"""So many raised steps are a replica's own fault; one more, and the request itself is the suspect."""
MAX_RETRY_WAIT_SECONDS = 5.0


class _ReplicaLost(Exception):
    """The replica cannot finish the request, but another one can."""


class _StepFailed(_ReplicaLost):
    """The replica raised while it computed the request, which may be the cause."""


class ReplicaClient:
    """An `EngineClient` over the deployments of the served models."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        receiver: TokenReceiver,
        *,
        max_resubmissions: int = 5,
        retry_wait_s: float = 0.2,
        acceptance_timeout_s: float = 60.0,
        resumption_timeout_s: float = 300.0,
        straggler_timeout_s: float = 10.0,
        health_timeout_s: float = 5.0,
    ) -> None:
        """Reach replicas through `handles`.

        Args:
            handles: by model name; the deployment has methods `generate` and `check_health`.
            receiver: where replicas send tokens.
            max_resubmissions: how many replicas may die under one request.
            retry_wait_s: before the first retry; doubles each time, up to `MAX_RETRY_WAIT_SECONDS`.
            acceptance_timeout_s: how long a new request may wait for a replica that accepts it. Once accepted, it may
                wait for its turn as long as the replica lives.
            resumption_timeout_s: the same after the loss of a replica, refusals included; long enough for a
                replacement to load the model.
            straggler_timeout_s: how long tokens may be on their way after the control call has returned.
            health_timeout_s: how long replicas may take to say that they make progress.
        """
        self._handles = handles
        self._receiver = receiver
        self._max_resubmissions = max_resubmissions
        self._retry_wait_s = retry_wait_s
        self._acceptance_timeout_s = acceptance_timeout_s
        self._resumption_timeout_s = resumption_timeout_s
        self._straggler_timeout_s = straggler_timeout_s
        self._health_timeout_s = health_timeout_s
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(GenerateReply)

    async def generate(self, model: str, request: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        """Run `request` on a replica of `model`; see `EngineClient`."""
        self._receiver.start()
        known = list(request.generated)
        losses = failed_steps = retries = 0
        now = asyncio.get_running_loop().time
        deadline = now() + self._acceptance_timeout_s
        for attempt in itertools.count():
            # A new id each time: tokens of the dead replica may still be on their way.
            current = msgspec.structs.replace(request, request_id=f"{request.request_id}~{attempt}", generated=[*known])
            outputs = self._attempt(model, current, deadline)
            try:
                async for output in outputs:
                    known.extend(output.tokens)
                    yield output
                return
            except _ReplicaLost as lost:
                losses += 1
                failed_steps += isinstance(lost, _StepFailed)
                if failed_steps > MAX_FAILED_STEPS:  # else it could take down one replica after another
                    raise errors.EngineError(
                        f"request {request.request_id} was in {failed_steps} steps that failed: {lost}"
                    ) from lost
                if losses > self._max_resubmissions:
                    raise errors.ReplicaUnavailable(
                        f"no replica of {model!r} could finish the request after {losses} attempts; try again later"
                    ) from lost
                logger.warning(
                    "request %s lost its replica after %d tokens (%s); resubmitting",
                    request.request_id,
                    len(known),
                    lost,
                )
                deadline, retries = now() + self._resumption_timeout_s, losses - 1
            except (errors.QueueFull, errors.ReplicaUnavailable):
                # A client whose answer has begun cannot send the request again, so we do.
                if not losses or now() >= deadline:
                    raise
                retries += 1
            finally:
                await outputs.aclose()
            await asyncio.sleep(min(self._retry_wait_s * 2**retries, MAX_RETRY_WAIT_SECONDS))

    async def stalled_models(self) -> list[str]:
        """Models of which no replica answers that it makes progress."""
        healthy = await asyncio.gather(*(self._makes_progress(handle) for handle in self._handles.values()))
        return [model for model, ok in zip(self._handles, healthy, strict=True) if not ok]

    async def _attempt(self, model: str, request: EngineRequest, deadline: float) -> AsyncGenerator[TokenOutput, None]:
        """Outputs of `request` from one replica, which has to accept it before `deadline` (loop time).

        Raises:
            _ReplicaLost: the request has to go elsewhere.
            ReplicaUnavailable: no replica has accepted it.
        """
        payload = self._encoder.encode(GenerateCall(request=request, reply_to=self._receiver.endpoint))
        with self._receiver.open(request.request_id, len(request.generated)) as mailbox:
            # Serve keys a call by the HTTP request that it was made for, and loses track of a second one under the
            # same key. An empty context gives every choice its own.
            response = contextvars.Context().run(self._handles[model].generate.remote, payload)
            control = asyncio.create_task(self._control(response, mailbox))
            finished = False
            try:
                output = await self._accepted(mailbox, model, deadline)
                while output is not None:
                    finished = output.finish_reason is not None
                    if output.tokens:
                        yield output
                    if finished:
                        return
                    output = await mailbox.get()
                raise _ReplicaLost("its last tokens never came")
            except TokensMissing as missing:
                raise _ReplicaLost(str(missing)) from None
            finally:
                if not finished:
                    response.cancel()
                control.cancel()
                await asyncio.gather(control, return_exceptions=True)

    async def _accepted(self, mailbox: Mailbox, model: str, deadline: float) -> TokenOutput | None:
        """The first output, which says that a replica has the request."""
        try:
            async with asyncio.timeout_at(deadline):
                return await mailbox.get()
        except TimeoutError:
            raise errors.ReplicaUnavailable(
                f"no replica of {model!r} has accepted the request in time; try again later"
            ) from None

    async def _control(self, response: Any, mailbox: Mailbox) -> None:
        """Wait for the end of the control call and close the mailbox with what it says."""
        try:
            reply = self._decoder.decode(await response)
        except asyncio.CancelledError:
            mailbox.close(_ReplicaLost("cancelled"))
            raise
        except RayTaskError as error:
            mailbox.close(errors.EngineError(f"generate() failed on the replica: {error.cause!r}"))
        except BackPressureError as error:
            mailbox.close(errors.QueueFull(str(error)))
        except DeploymentUnavailableError as error:
            mailbox.close(errors.ReplicaUnavailable(str(error)))
        except RayError as error:
            # The actor, its worker or its node died, or the replica was taken down before the request was done.
            mailbox.close(_ReplicaLost(type(error).__name__))
        except Exception as error:
            mailbox.close(error)
        else:
            if reply.error is not None:
                mailbox.close(_error_of(reply))
                return
            await asyncio.sleep(self._straggler_timeout_s)
            mailbox.close()

    async def _makes_progress(self, handle: DeploymentHandle) -> bool:
        """True if one of the deployment's replicas says that it is healthy."""
        try:
            replies = await handle.broadcast("check_health").results_async(
                timeout_s=self._health_timeout_s, return_exceptions=True
            )
        except Exception as error:  # whatever the cause: no replica has confirmed
            logger.warning("health of %s is unknown: %s", handle.deployment_name, error)
            return False
        return any(not isinstance(reply, BaseException) for reply in replies)


def _error_of(reply: GenerateReply) -> Exception:
    """The exception that a replica's reply stands for."""
    message = reply.error or ""
    kind = getattr(errors, reply.error_kind or "", None)
    if kind is errors.QueueFull:
        return errors.QueueFull(message, retry_after=reply.retry_after)
    if kind is errors.EngineError or kind is errors.StepFailed:
        return _StepFailed(message)
    if isinstance(kind, type) and issubclass(kind, errors.EngineError | errors.ReplicaUnavailable):
        return _ReplicaLost(message)
    if isinstance(kind, type) and issubclass(kind, errors.RequestError):
        return kind(message)
    return errors.EngineError(message)
