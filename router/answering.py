"""From a prepared request to its response: decide who answers, run it, and try the next best if that one cannot."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from fastapi import Request, Response

from ..cluster.errors import QueueFull, ReplicaUnavailable
from ..cluster.latency_class import LatencyTargets
from .decision import Decision
from .engine_client import EngineClient, attempt_id
from .escalation import DraftUnsure, Escalation
from .event_stream import ClientGone, EventStream, WhileConnected
from .explanation import explain, route_header
from .generation import Delta, Updates, run_choices
from .latency_request import latency_targets
from .metrics import IngressMetrics, RequestTimer
from .preparation import Context, Job, Preparation, find_models
from .prompt_encoding import Encoded, ServedModel
from .router import Router
from .stream_encoder import StreamEncoder

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a request whose client went away; nobody receives it."""
SESSION_HEADER = "x-session-id"
ROUTE_HEADER = "x-troupe-route"
_MAX_SESSION = 1024


@dataclass(frozen=True)
class Asked:
    """What a request asks for besides its body's content."""

    latency: LatencyTargets
    cache_salt: str
    session: str


class Answering:
    """Answers prepared requests over an engine client, as the router decides."""

    def __init__(
        self, served: Mapping[str, ServedModel], router: Router, engine: EngineClient, metrics: IngressMetrics
    ) -> None:
        self._served = served
        self._router = router
        self._engine = engine
        self._metrics = metrics
        escalation = router.config.escalation
        self._escalation = None if escalation is None else Escalation(escalation)

    async def answer(self, http: Request, preparation: Preparation[Any]) -> Response:
        """The whole response, or its beginning and a stream."""
        asked = self._asked(http, preparation)
        try:
            return await self._answer(http, preparation, asked)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except QueueFull as error:
            self._metrics.refused.inc(1, {"latency_class": asked.latency.name, "code": error.code or ""})
            raise

    async def _answer(self, http: Request, preparation: Preparation[Any], asked: Asked) -> Response:
        members, encoded, given_up = await self._encode(preparation)
        began = time.perf_counter()
        unsure: str | None = None  # whose draft was thrown away: it answers if the others are down
        while True:
            job, decision = self._decide(preparation, encoded, members, asked, given_up, last=unsure is None)
            timer = RequestTimer(self._metrics, job.model, asked.latency, len(job.choices), began)
            try:
                return await self._run(http, job, decision, timer)
            except ReplicaUnavailable as error:
                given_up[job.model] = "down"
                if len(given_up) == len(members):
                    if unsure is None:
                        raise
                    del given_up[unsure]
                    unsure = None
                logger.warning("%s is down (%s): the next best model answers", job.model, error)
            except DraftUnsure as error:
                unsure = job.model
                given_up[job.model] = str(error)
            except QueueFull as error:
                if not decision.checked:  # else the others only wait for the draft
                    given_up.update(decision.choice.excluded)  # load alone does not lower the quality
                given_up[job.model] = str(error)
                if len(given_up) == len(members):
                    raise

    async def explain(self, http: Request, preparation: Preparation[Any]) -> dict[str, Any]:
        """What would be decided, and by what; nothing is sent."""
        asked = self._asked(http, preparation)
        members, encoded, unable = await self._encode(preparation)
        able = list(encoded)
        decision = self._route(preparation, encoded, able, asked, unable)
        everyone = self._router.survey(
            able,
            _first_prompts(encoded, able),
            preparation.max_tokens,
            asked.latency,
            cache_salt=asked.cache_salt,
            session=asked.session,
        )
        return explain(self._router, decision, everyone, members, asked.latency)

    # --- deciding -------------------------------------------------------------------------------------------------

    def _asked(self, http: Request, preparation: Preparation[Any]) -> Asked:
        request, headers = preparation.request, http.headers
        salt = request.cache_salt or ""
        if self._router.config.salt_by_api_key:
            key = headers.get("authorization", "")
            salt = f"{blake2b(key.encode(), digest_size=16).hexdigest()}/{salt}"
        return Asked(
            latency=latency_targets(headers, request.service_tier, self._router.classes),
            cache_salt=salt,
            session=(headers.get(SESSION_HEADER) or request.prompt_cache_key or "")[:_MAX_SESSION],
        )

    async def _encode(
        self, preparation: Preparation[Any]
    ) -> tuple[tuple[str, ...], dict[str, Encoded], dict[str, str]]:
        """The models that the client allows, the request as each of them sees it, and why some cannot serve it."""
        members = find_models(self._served, self._router.groups, preparation.request.model)
        return members, *await preparation.encode([self._served[name] for name in members])

    def _decide(
        self,
        preparation: Preparation[Any],
        encoded: Mapping[str, Encoded],
        members: Sequence[str],
        asked: Asked,
        given_up: Mapping[str, str],
        *,
        last: bool,
    ) -> tuple[Job, Decision]:
        """Choose model and replica, and count the request there at once. If the models that are left are the `last`
        that could answer, it is worth waiting for one of them."""
        left = [name for name in members if name not in given_up]
        decision = self._route(preparation, encoded, left, asked, given_up)
        context = Context(asked.latency, asked.cache_salt, scored=decision.checked)
        job = preparation.job(self._served[decision.model], encoded[decision.model], context)
        first = job.choices[0]
        first.replica = decision.replica
        for choice in job.choices:
            # Where no replica is known of any model, the best one is waited for.
            choice.patient = last and (len(left) == 1 or decision.replica is None)
        self._router.reserve(attempt_id(first.request.request_id, 0), decision, asked.latency, asked.session)
        return job, decision

    def _route(
        self,
        preparation: Preparation[Any],
        encoded: Mapping[str, Encoded],
        models: Sequence[str],
        asked: Asked,
        given_up: Mapping[str, str],
    ) -> Decision:
        return self._router.route(
            models,
            _first_prompts(encoded, models),
            preparation.max_tokens,
            asked.latency,
            preparation.facts(encoded[models[0]], asked.latency.name),
            cache_salt=asked.cache_salt,
            session=asked.session,
            given_up=given_up,
        )

    # --- running --------------------------------------------------------------------------------------------------

    async def _run(self, http: Request, job: Job, decision: Decision, timer: RequestTimer) -> Response:
        """Run a job that is reserved, until its end or, of a stream, its first token."""
        reserved = attempt_id(job.choices[0].request.request_id, 0)
        streams = False
        try:
            response = await self._respond(http, job, decision, timer, lambda: self._router.release(reserved))
            streams = job.stream
            return response
        finally:
            if streams:
                self._router.arrived(reserved)
            else:
                self._router.release(reserved)

    async def _respond(
        self, http: Request, job: Job, decision: Decision, timer: RequestTimer, on_end: Callable[[], None]
    ) -> Response:
        headers = {"x-request-id": job.format.options.id, ROUTE_HEADER: route_header(decision)}
        updates = run_choices(job.choices, self._engine, job.model)
        try:
            if decision.checked:
                assert self._escalation is not None, "drafts are checked only where escalation is configured"
                async with WhileConnected(http.receive):
                    updates = await self._escalation.check(updates)
            if not job.stream:
                async with WhileConnected(http.receive):
                    body = await _collect(job, updates, timer)
                return Response(body, headers=headers, media_type="application/json")
            encoder = StreamEncoder(job, timer)
            # Until the first token a failure still has its own HTTP status.
            async with WhileConnected(http.receive):
                first = encoder.event(await anext(updates))
        except BaseException:
            await updates.aclose()  # tokens may have come in the moment in which the client left
            raise
        return EventStream(first, updates, encoder, headers, on_end)


def _first_prompts(encoded: Mapping[str, Encoded], models: Sequence[str]) -> dict[str, list[int]]:
    """What a decision goes by: of several prompts the first, as each model sees it."""
    return {name: encoded[name].prompts[0] for name in models}


async def _collect(job: Job, updates: Updates, timer: RequestTimer) -> bytes:
    """The whole response body."""
    parts: list[list[Delta]] = [[] for _ in job.choices]
    try:
        async for choice, delta in updates:
            timer.update(choice.index, len(delta.tokens), delta.finish_reason)
            parts[choice.index].append(delta)
    finally:
        await updates.aclose()
    return job.format.body(job.choices, [_joined(deltas) for deltas in parts])


def _joined(deltas: list[Delta]) -> Delta:
    return Delta(
        text="".join(delta.text for delta in deltas),
        tokens=[token for delta in deltas for token in delta.tokens],
        chances=[chance for delta in deltas for chance in delta.chances],
        finish_reason=deltas[-1].finish_reason,
    )
