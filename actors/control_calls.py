"""The control calls of a replica: one per request, from its arrival to its end."""

from __future__ import annotations

import asyncio

from ..cluster.errors import EngineError, ReplicaUnavailable, RequestError, TargetUnreachable
from ..cluster.messages import GenerateCall, GenerateReply
from ..cluster.request import TokenOutput
from .engine_loop import EngineLoop
from .token_sender import TokenSender


class ControlCalls:
    """Hands requests to the engine and their outputs to the sender. Use it on the engine's event loop."""

    def __init__(self, engine: EngineLoop, sender: TokenSender) -> None:
        self._engine = engine
        self._sender = sender
        self._ended: dict[str, asyncio.Future[GenerateReply]] = {}
        self._failure: EngineError | None = None
        engine.refuse = self.refuse

    async def serve(self, call: GenerateCall) -> GenerateReply:
        """Serve one request; returns when it has ended. Cancelling it aborts the request."""
        request = call.request
        request_id = request.request_id
        if self._failure is not None:
            return reply_to(self._failure)
        try:
            self._engine.add(request)
        except RequestError as error:
            return reply_to(error)
        ended = self._ended[request_id] = asyncio.get_running_loop().create_future()
        try:
            self._sender.register(request_id, call.reply_to, patient=request.latency.yields)
            self._sender.publish([TokenOutput(request_id, [], index=len(request.generated))])  # it is accepted
            return await ended
        finally:
            self._engine.abort(request_id)  # unless it is done
            del self._ended[request_id]
            self._sender.unregister(request_id)

    def publish(self, outputs: list[TokenOutput]) -> None:
        """Send the outputs of a step, and end the calls whose requests are done."""
        self._sender.publish(outputs)
        for output in outputs:
            if output.finish_reason is not None:
                self._end(output.request_id, GenerateReply())

    def refuse(self, request_id: str, error: TargetUnreachable) -> None:
        """End the call of a request that has waited in vain."""
        self._end(request_id, reply_to(error))

    def abort_orphans(self) -> None:
        """Abort the requests whose ingress is gone. If it lives and just cannot be reached, the reply tells it."""
        for request_id in self._sender.drop_unreachable():
            self._engine.abort(request_id)
            self._end(request_id, reply_to(ReplicaUnavailable("the replica cannot reach the ingress")))

    def fail(self, error: EngineError) -> None:
        """End every call, and every later one, with `error`."""
        self._failure = error
        for request_id in self._ended:
            self._end(request_id, reply_to(error))

    def _end(self, request_id: str, reply: GenerateReply) -> None:
        ended = self._ended.get(request_id)
        if ended is not None and not ended.done():
            ended.set_result(reply)


def reply_to(error: RequestError | EngineError) -> GenerateReply:
    """How a control call reports `error`."""
    return GenerateReply(str(error), type(error).__name__, getattr(error, "retry_after", 1))
