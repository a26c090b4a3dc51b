"""The router of one ingress: everything that it knows, and the decisions that it takes with it.

Reports of the replicas and Serve's lists of replicas come in, decisions go out; nothing here waits, so a decision and
its reservation are one moment and a burst of requests does not meet at one replica.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from ..cluster.block_hash import short_block_hashes
from ..cluster.errors import RequestError, TargetUnreachable
from ..cluster.latency_class import LatencyTargets
from ..cluster.messages import ModelCard
from ..cluster.request import EngineRequest
from ..cluster.router_config import RouterConfig
from .classifier import Classifier
from .decision import Candidates, Choice, Decision, Prompt
from .fleet import Fleet
from .ongoing_prefixes import OngoingPrefixes
from .policy import decide, weigh
from .prefix_index import PrefixIndex
from .prompt_features import PromptFacts
from .sessions import Sessions
from .variants import Variants

logger = logging.getLogger(__name__)

EXPECTED_OUTPUT_TOKENS = 256
"""Output that is expected at most when prices are compared; `max_tokens` is often far above what comes."""


class Router:
    """Chooses model and replica. Use it in one thread."""

    def __init__(
        self,
        cards: Sequence[ModelCard],
        config: RouterConfig | None = None,
        classifier: Classifier | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Route among the models of `cards`.

        Args:
            cards: the served models.
            config: as the user wrote it.
            classifier: the content of `config.classifier`.
            clock: seconds of a monotonic clock.
        """
        self.config = config or RouterConfig()
        self.fleet = Fleet(cards, clock)
        self.index = PrefixIndex(self.config.index_blocks)
        self.classes = self.config.targets()
        self._groups = self.config.all_groups([card.name for card in cards])
        self._variants = Variants(cards, self.config, classifier)
        self._sessions = Sessions()
        self._ongoing = OngoingPrefixes()

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """Names that stand for several models."""
        return self._groups

    def route(
        self,
        models: Sequence[str],
        prompts: Mapping[str, Sequence[int]],
        max_tokens: int | None,
        targets: LatencyTargets,
        facts: PromptFacts,
        *,
        cache_salt: str = "",
        session: str = "",
        given_up: Mapping[str, str] | None = None,
    ) -> Decision:
        """Decide who answers; nothing is counted yet (see `reserve`).

        Args:
            models: that the client allows.
            prompts: token ids as each of `models` sees the prompt; equal ones should be the same object.
            max_tokens: that may be generated; None: as many as the context holds.
            targets: of the request's latency class.
            facts: of the prompt, for rules and classifier.
            cache_salt: of the request.
            session: what requests of one conversation have in common; "": none.
            given_up: other models of the group → why they do not answer.

        Raises:
            TargetUnreachable, InvalidRequest: as `policy.decide`.
        """
        choice = self._variants.choose(models, facts, given_up)
        views, ranked = self._views(prompts, cache_salt), self._variants.best_first(models)

        def decided(choice: Choice) -> Decision:
            return self._decide(choice, views, ranked, max_tokens, targets, session)

        def decided_or_without_draft() -> Decision:
            draft = choice.draft
            try:
                return decided(choice)
            except TargetUnreachable:
                if draft is None or choice.models != (draft,):
                    raise
            # It would be late; the model that it would have drafted for may not be.
            others = [model for model in models if model != draft]
            return decided(self._variants.choose(others, facts, {**(given_up or {}), draft: "its draft would be late"}))

        if not self.config.shadow or len(models) == 1:
            return decided_or_without_draft()
        best, reason = ranked[0], "shadow mode: the best model answers"
        excluded = {**dict.fromkeys(ranked, reason), **choice.excluded}
        del excluded[best]
        decision = decided(Choice((best,), reason, choice.probabilities, excluded))
        try:
            would = decided_or_without_draft()
        except RequestError as error:
            logger.info("shadow: instead of %s's answer there would be none (%s)", decision.model, error)
            return decision
        if would.model == decision.model:
            return decision
        logger.info("shadow: %s would answer instead of %s (%s)", would.model, decision.model, would.reason)
        return msgspec.structs.replace(decision, shadow=would.model)

    def survey(
        self,
        models: Sequence[str],
        prompts: Mapping[str, Sequence[int]],
        max_tokens: int | None,
        targets: LatencyTargets,
        *,
        cache_salt: str = "",
        session: str = "",
    ) -> Candidates | None:
        """What a request would cost on every replica of `models`, whichever may answer; arguments as those of `route`.
        None if no replica is up."""
        return weigh(
            self.fleet,
            tuple(models),
            self._views(prompts, cache_salt),
            _expected_output(max_tokens),
            targets,
            self.config.weights,
            self._sessions.model_of(session) if session else None,
        )

    def place(self, model: str, request: EngineRequest) -> Decision:
        """Choose a replica for a request whose model is decided; raises as `route`."""
        tokens = request.prompt + request.generated if request.generated else request.prompt
        views = self._views({model: tokens}, request.cache_salt)
        targets = request.latency
        if request.generated and targets.refuse_late:  # its client has begun to read
            targets = msgspec.structs.replace(targets, refuse_late=False)
        choice = Choice((model,), "the only model")
        return self._decide(choice, views, (), request.sampling.max_tokens, targets, "")

    def reserve(self, request_id: str, decision: Decision, targets: LatencyTargets, session: str = "") -> None:
        """Count a request that is being sent where `decision` says."""
        if session:
            self._sessions.record(session, decision.model)
        if decision.replica is not None:
            self.fleet.reserve(request_id, decision.replica, decision.uncached_tokens, yields=targets.yields)
            self._ongoing.add(request_id, decision.replica, decision.prompt.hashes)

    def arrived(self, request_id: str) -> None:
        """The replica has the request, whether it has reported it yet or not."""
        self.fleet.release(request_id)

    def started(self, request_id: str) -> None:
        """The request has its first token, so its prompt is in the replica's cache."""
        self._ongoing.started(request_id)

    def release(self, request_id: str) -> None:
        """The request will not be sent, or has ended."""
        self.fleet.release(request_id)
        self._ongoing.remove(request_id)

    def lost(self, replica: str) -> None:
        """A request was lost there: avoid it until Serve has found out what it is."""
        self.fleet.suspect(replica)

    def has_another(self, model: str) -> bool:
        """Whether a replica of `model` is up besides those that have just lost a request."""
        return self.fleet.trusts(model)

    def set_replicas(self, model: str, replicas: Collection[str]) -> tuple[set[str], set[str]]:
        """The replicas of `model` that Serve says are up; returns those that are new and those that are gone.

        What the index knows of those that are gone is for the caller to remove: it may still be taking it in.
        """
        gone = self.fleet.replicas(model) - set(replicas)
        return self.fleet.set_replicas(model, replicas), gone

    def _views(self, prompts: Mapping[str, Sequence[int]], cache_salt: str) -> dict[str, Prompt]:
        """The prompts with where they are warm; looked up once for all models that see the same tokens."""
        found: dict[tuple[int, int], Prompt] = {}
        views = {}
        for model, tokens in prompts.items():
            size = self.fleet.cards[model].block_size
            key = (id(tokens), size)
            if key not in found:
                hashes = short_block_hashes(tokens, size, cache_salt)
                overlaps = self._ongoing.extend(self.index.overlaps(hashes), hashes)
                found[key] = Prompt(len(tokens), overlaps, hashes, self._copies_wanted(overlaps, hashes))
            views[model] = found[key]
        return views

    def _copies_wanted(self, overlaps: Mapping[str, int], hashes: Sequence[int]) -> float:
        """Requests under way that share the longest cached beginning of a prompt, per replica that has it."""
        longest = max(overlaps.values(), default=0)
        if not longest:
            return 1.0
        holders = sum(1 for blocks in overlaps.values() if 2 * blocks >= longest)
        return max(1.0, self._ongoing.demand(hashes, longest) / holders)

    def _decide(
        self,
        choice: Choice,
        views: Mapping[str, Prompt],
        ranked: Sequence[str],
        max_tokens: int | None,
        targets: LatencyTargets,
        session: str,
    ) -> Decision:
        return decide(
            self.fleet,
            choice,
            views,
            _expected_output(max_tokens),
            targets,
            self.config.weights,
            session_model=self._sessions.model_of(session) if session else None,
            fallbacks=[model for model in ranked if model not in choice.models],
        )


def _expected_output(max_tokens: int | None) -> int:
    return EXPECTED_OUTPUT_TOKENS if max_tokens is None else min(max_tokens, EXPECTED_OUTPUT_TOKENS)
