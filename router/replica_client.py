"""The engine as the ingress reaches it in a cluster: control through a Ray Serve handle, tokens through ZeroMQ.

For every request one unary handle call lives as long as the request. Serve sees it as load, drains it, cancels it,
and its failure tells that the replica died. The tokens come to the `TokenReceiver`. When a replica dies, the prompt
and the tokens so far go to another one, which goes on where the first stopped: the random number of a token depends
on seed and position only, so the client cannot tell.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ..cluster import errors
from ..cluster.messages import GenerateCall, GenerateReply
from ..cluster.request import EngineRequest, FinishReason, TokenOutput
from .token_receiver import Mailbox, TokenReceiver

logger = logging.getLogger(__name__)


class _ReplicaLost(Exception):
    """The replica cannot finish the request, but another one can."""


class ReplicaClient:
    """An `EngineClient` over the deployments of the served models."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        receiver: TokenReceiver,
        *,
        max_resubmissions: int = 5,
        resubmission_wait_s: float = 0.2,
        resubmission_timeout_s: float = 60.0,
        straggler_timeout_s: float = 10.0,
        health_timeout_s: float = 5.0,
    ) -> None:
        """Reach replicas through `handles`.

        Args:
            handles: by model name; the deployment has methods `generate` and `check_health`.
            receiver: where replicas send tokens.
            max_resubmissions: how many replicas may die under one request.
            resubmission_wait_s: before the first resubmission; doubles each time.
            resubmission_timeout_s: how long a resubmitted request may wait for its first token.
            straggler_timeout_s: how long tokens may be on their way after the control call has returned.
            health_timeout_s: how long replicas may take to say that they make progress.
        """
        self._handles = handles
        self._receiver = receiver
        self._max_resubmissions = max_resubmissions
        self._resubmission_wait_s = resubmission_wait_s
        self._resubmission_timeout_s = resubmission_timeout_s
        self._straggler_timeout_s = straggler_timeout_s
        self._health_timeout_s = health_timeout_s
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(GenerateReply)

    async def generate(self, model: str, request: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        """Run `request` on a replica of `model`; see `EngineClient`."""
        self._receiver.start()
        known = list(request.generated)
        for attempt in range(self._max_resubmissions + 1):
            # A new id each time: tokens of the dead replica may still be on their way.
            current = msgspec.structs.replace(request, request_id=f"{request.request_id}~{attempt}", generated=[*known])
            outputs = self._attempt(model, current, resubmitted=attempt > 0)
            try:
                async for output in outputs:
                    known.extend(output.tokens)
                    yield output
                return
            except _ReplicaLost as lost:
                logger.warning(
                    "request %s lost its replica after %d tokens (%s); resubmitting",
                    request.request_id,
                    len(known),
                    lost,
                )
            finally:
                await outputs.aclose()
            await asyncio.sleep(self._resubmission_wait_s * 2**attempt)
        raise errors.ReplicaUnavailable(
            f"no replica of {model!r} could finish the request after {self._max_resubmissions + 1} attempts; "
            "try again later"
        )

    async def stalled_models(self) -> list[str]:
        """Models of which no replica answers that it makes progress."""
        healthy = await asyncio.gather(*(self._makes_progress(handle) for handle in self._handles.values()))
        return [model for model, ok in zip(self._handles, healthy, strict=True) if not ok]

    async def _attempt(
        self, model: str, request: EngineRequest, *, resubmitted: bool
    ) -> AsyncGenerator[TokenOutput, None]:
        """Outputs of `request` from one replica.

        Raises:
            _ReplicaLost: the request has to go elsewhere.
        """
        payload = self._encoder.encode(GenerateCall(request=request, reply_to=self._receiver.endpoint))
        with self._receiver.open(request.request_id) as mailbox:
            # Serve keys a call by the HTTP request that it was made for, and loses track of a second one under the
            # same key. An empty context gives every choice its own.
            response = contextvars.Context().run(self._handles[model].generate.remote, payload)
            control = asyncio.create_task(self._control(response, mailbox))
            finished = False
            try:
                timeout = self._resubmission_timeout_s if resubmitted else None
                while not finished:
                    try:
                        output = await asyncio.wait_for(mailbox.get(), timeout)
                    except TimeoutError:
                        raise _ReplicaLost(f"no token within {timeout} s") from None
                    timeout = None
                    if output is None:
                        raise _ReplicaLost("its last tokens never came")
                    if output.finish_reason is FinishReason.ABORT:
                        continue  # the control call says why
                    finished = output.finish_reason is not None
                    yield output
            finally:
                if not finished:
                    response.cancel()
                control.cancel()
                await asyncio.gather(control, return_exceptions=True)

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
    if isinstance(kind, type) and issubclass(kind, errors.EngineError | errors.ReplicaUnavailable):
        return _ReplicaLost(message)
    if isinstance(kind, type) and issubclass(kind, errors.RequestError):
        return kind(message)
    return errors.EngineError(message)
