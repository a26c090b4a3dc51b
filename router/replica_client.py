"""The engine as the ingress reaches it in a cluster: control through a Ray Serve handle, tokens through ZeroMQ.

For every request one unary handle call lives as long as the request. Serve sees it as load, drains it, cancels it,
and its failure tells that the replica died. The tokens come to the `TokenReceiver`. When a replica dies, the prompt
and the tokens so far go to another one, which goes on where the first stopped: the random number of a token depends
on seed and position only, so the client cannot tell.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Self

import msgspec
from ray.serve.handle import DeploymentHandle

from ..cluster import errors
from ..cluster.request import EngineRequest, TokenOutput
from .engine_client import attempt_id
from .replica_attempt import ReplicaAttempt, ReplicaLost, ReplicaStepFailed
from .router import Router
from .token_receiver import TokenReceiver, TokensMissing

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 1
"""So many raised steps are a replica's own fault; one more, and the request itself is the suspect."""
MAX_RETRY_WAIT_SECONDS = 5.0


class ReplicaClient:
    """An `EngineClient` over the deployments of the served models."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        receiver: TokenReceiver,
        router: Router,
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
            router: chooses the replicas.
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
        self._router = router
        self._max_resubmissions = max_resubmissions
        self._retry_wait_s = retry_wait_s
        self._acceptance_timeout_s = acceptance_timeout_s
        self._resumption_timeout_s = resumption_timeout_s
        self._straggler_timeout_s = straggler_timeout_s
        self._health_timeout_s = health_timeout_s

    def generate(
        self, model: str, request: EngineRequest, replica: str | None = None, *, patient: bool = True
    ) -> Generation:
        """Run `request` on a replica of `model`, from the first `anext` on; see `EngineClient`."""
        return Generation(self, model, request, replica, patient=patient)

    async def stalled_models(self) -> list[str]:
        """Models of which no replica answers that it makes progress."""
        healthy = await asyncio.gather(*(self._makes_progress(handle) for handle in self._handles.values()))
        return [model for model, ok in zip(self._handles, healthy, strict=True) if not ok]

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


class Generation:
    """One request on its way through the replicas of its model: an async iterator of its outputs.

    It is a class, not an async generator, because every token of every stream passes here: a generator costs more per
    item, and two would be needed.
    """

    def __init__(
        self, client: ReplicaClient, model: str, request: EngineRequest, replica: str | None, *, patient: bool
    ) -> None:
        """Nothing is sent before the first output is asked for."""
        self._client = client
        self._model = model
        self._request = request
        self._replica = replica
        """Where the next attempt goes, if that is decided already."""
        self._patient = patient
        self._known = list(request.generated)
        self._attempt: ReplicaAttempt | None = None
        self._first = True
        """The present attempt has no token yet."""
        self._attempts = self._losses = self._failed_steps = self._retries = 0
        self._deadline = 0.0
        """Until then (loop time) a replica has to accept the request."""
        self._finished = self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenOutput:
        if self._finished or self._closed:
            await self.aclose()
            raise StopAsyncIteration
        try:
            while True:
                try:
                    if self._attempt is not None:
                        mailbox = self._attempt.mailbox
                        while (output := mailbox.take()) is None and not mailbox.closed:
                            await mailbox.arrival()
                    else:
                        self._attempt = self._submit()
                        output = await self._attempt.accepted(self._model, self._deadline)
                    if output is None:
                        raise ReplicaLost("its last tokens never came")
                except (ReplicaLost, TokensMissing, errors.QueueFull, errors.ReplicaUnavailable) as error:
                    lost = isinstance(error, ReplicaLost | TokensMissing)
                    if lost and self._attempt is not None and self._attempt.replica:
                        self._client._router.lost(self._attempt.replica)
                    await self._end_attempt()
                    await self._before_retry(error)
                    continue
                if output.finish_reason is not None:
                    self._finished = True
                if output.tokens:
                    if self._first:
                        self._first = False
                        self._client._router.started(attempt_id(self._request.request_id, self._attempts - 1))
                    self._known.extend(output.tokens)
                    return output
                if self._finished:
                    raise StopAsyncIteration
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Stop; a request that is not finished is aborted. May be called twice."""
        self._closed = True
        await self._end_attempt()

    def _submit(self) -> ReplicaAttempt:
        client = self._client
        if self._attempts == 0:
            client._receiver.start()
            self._deadline = asyncio.get_running_loop().time() + client._acceptance_timeout_s
        # A new id each time: tokens of the dead replica may still be on their way.
        request_id = attempt_id(self._request.request_id, self._attempts)
        self._attempts += 1
        self._first = True
        request = msgspec.structs.replace(self._request, request_id=request_id, generated=[*self._known])
        replica, self._replica = self._replica, None
        if replica is None:
            decision = client._router.place(self._model, request)
            client._router.reserve(request_id, decision, request.latency)
            replica = decision.replica
        if replica is None and not self._patient:
            raise errors.ReplicaUnavailable(f"no replica of {self._model!r} is up")
        return ReplicaAttempt(
            client._handles[self._model], client._receiver, request, client._straggler_timeout_s, replica
        )

    @property
    def _may_go_elsewhere(self) -> bool:
        """Another model may still answer instead."""
        return not self._patient and not self._known

    async def _end_attempt(self) -> None:
        attempt, self._attempt = self._attempt, None
        self._client._router.release(attempt_id(self._request.request_id, max(0, self._attempts - 1)))
        if attempt is not None:
            await attempt.close(finished=self._finished)

    async def _before_retry(self, error: Exception) -> None:
        """Wait until it is time to send the request again.

        Raises:
            EngineError, ReplicaUnavailable, QueueFull: it should not be sent again.
        """
        client, request_id = self._client, self._request.request_id
        now = asyncio.get_running_loop().time()
        if isinstance(error, errors.QueueFull | errors.ReplicaUnavailable):
            # A client whose answer has begun cannot send the request again, so we do.
            late = isinstance(error, errors.TargetUnreachable)
            if not self._losses or now >= self._deadline or late or self._may_go_elsewhere:
                raise error
            self._retries += 1
        else:
            self._losses += 1
            self._failed_steps += isinstance(error, ReplicaStepFailed)
            if self._failed_steps > MAX_FAILED_STEPS:  # else it could take down one replica after another
                raise errors.EngineError(
                    f"request {request_id} was in {self._failed_steps} steps that failed: {error}"
                ) from error
            if self._losses > client._max_resubmissions:
                raise errors.ReplicaUnavailable(
                    f"no replica of {self._model!r} could finish the request after {self._losses} attempts; "
                    "try again later"
                ) from error
            if self._may_go_elsewhere and not client._router.has_another(self._model):
                raise errors.ReplicaUnavailable(f"a replica of {self._model!r} was lost: {error}") from error
            logger.warning(
                "request %s lost its replica after %d tokens (%s); resubmitting", request_id, len(self._known), error
            )
            if not self._may_go_elsewhere:
                self._deadline = now + client._resumption_timeout_s
            self._retries = self._losses - 1
        await asyncio.sleep(min(client._retry_wait_s * 2**self._retries, MAX_RETRY_WAIT_SECONDS))
