"""What work that yields may take of a step: the rules of class `batch`."""

from __future__ import annotations

from itertools import islice

from .kv_manager import KVManager
from .pace import Pace
from .running_set import RunningSet
from .sequence import Sequence
from .waiting_queue import WaitingQueue

TOKEN_SHARE = 0.5
"""Of the target for the time between tokens: prompts that yield fill a step up to there. Steps that belong to prompts
which do not yield come between."""
RIDE_SHARE = 0.05
"""Sequences that yield ride along in a step of others' prompts, one token each, as long as it takes no more than this
share longer: on a GPU that is most of them, and the step would be as long without them."""
WAIT = -2
"""It is too early to plan the step."""
NOTHING = -1
"""The step is for others' prompts."""


class YieldingRules:
    """Decides before each step.

    Args:
        budget: tokens of a step.
        one_stage: a replica without pipeline stages, which has work while it executes one plan.
    """

    def __init__(
        self, running: RunningSet, waiting: WaitingQueue, kv: KVManager, pace: Pace, budget: int, one_stage: bool
    ) -> None:
        self._running = running
        self._waiting = waiting
        self._kv = kv
        self._pace = pace
        self._budget = budget
        self._one_stage = one_stage

    def share(self, remaining: float, early: bool, now: float) -> int:
        """Tokens of prompts that yield which the next step may compute, or `NOTHING`, or `WAIT`.

        Args:
            remaining: seconds that the plans in flight still take.
            early: there is time until the next step must be planned.
            now: the time.
        """
        running = self._running.tally
        if not running.yielding and not self._waiting.tally.yielding:
            return self._budget
        if running.lacking > running.yielding_lacking:
            return NOTHING  # a first token does not wait for them
        head = self._waiting.head()
        fits = head is not None and not head.pending and self._running.fits(head, self._kv.cached_prefix(head))
        if fits and head is not None and not head.yields:
            return NOTHING
        rows, others = running.sequences, running.sequences - running.yielding
        prompts_wait = fits or running.yielding_lacking > 0
        if not prompts_wait and not running.yielding:
            return 0
        if early and self._one_stage:
            return WAIT  # a request that arrives meanwhile goes first
        if not prompts_wait:
            return 0
        patience = self._pace.patience(rows, now) - remaining
        if others:
            decoding = islice(self._running.sequences, others)
            patience = min(patience, TOKEN_SHARE * min(sequence.request.latency.tpot for sequence in decoding))
        # At least a trickle, lest a target that is out of reach stops all work that yields.
        return max(self._pace.chunk_within(patience, rows, self._budget), self._kv.block_size)

    def riders(self) -> int:
        """How many yielding sequences get a token in a step for others' prompts."""
        running, waiting, curve = self._running.tally, self._waiting.tally, self._pace.curve
        head = self._waiting.head()
        if curve is None or waiting.sequences - waiting.yielding > self._running.free_slots:
            return 0  # they may have to give way while the step is planned
        prompts = running.lacking - running.yielding_lacking
        if head is not None and not head.yields:
            cached = self._kv.cached_prefix(head)
            if not self._running.fits(head, cached):
                return 0
            prompts += max(0, head.lacking - self._kv.block_size * len(cached))
        step = curve.seconds(min(prompts, self._budget), running.sequences - running.yielding)
        if not curve.decode_row:
            return running.yielding
        return min(running.yielding, int(RIDE_SHARE * step / curve.decode_row))


class PromptBudget:
    """Tokens that a step has left for prompts, and the part of them that yielding ones may take."""

    __slots__ = ("_tokens", "_yielding", "leaves_yielding_out")

    def __init__(self, tokens: int, yielding: int, *, leaves_yielding_out: bool) -> None:
        self._tokens = tokens
        self._yielding = yielding
        self.leaves_yielding_out = leaves_yielding_out
        """Nothing that yields has a part in the step, so it can still be preempted while the step is planned."""

    def share(self, sequence: Sequence) -> int:
        """For the next chunk; the sequence may need less."""
        return min(self._tokens, self._yielding) if sequence.yields else self._tokens

    def spend(self, sequence: Sequence, count: int) -> None:
        """A chunk was planned."""
        self._tokens -= count
        if sequence.yields:
            self._yielding -= count
