"""What this ingress knows of every replica: which there are, their load as last reported, and what it has sent since.

All that a decision needs of a replica is one row of one array, so that a decision over hundreds of candidates is a few
operations on columns (`router/cost.py`).

A request that has been sent counts as *reserved* at its replica from the moment of the decision until a report says
that the replica has it: requests of the same moment see each other, and none is counted twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..cluster.messages import ModelCard
from ..cluster.replica_report import ReplicaLoad, StepCurve
from .replica_state import Column, ReplicaState

RESERVATION_SECONDS = 60.0
"""A reservation that nobody released by then has been lost on some way that was not thought of."""
_LONGEST = 86_400.0
"""Seconds; what a replica reports to take longer is a mistake."""
_SHARED = 0.5
"""Of the mean curve of its model in a replica's curve: on a machine that others disturb, equal replicas measure
themselves as different, and half of the difference is enough to see that one is on slower hardware."""
_NEWS = 1 / 16
"""Of a report in that mean."""
SUSPECT_SECONDS = 5.0
"""A replica that broke a request gets no new ones for so long, unless there is no other."""


class Reservation(msgspec.Struct, frozen=True):
    """What a request that was sent adds to a replica."""

    replica: str
    tokens: int
    yields: bool
    made: float
    """Seconds of the fleet's clock."""


class Fleet:
    """The replicas of all served models. Use it in one thread."""

    def __init__(self, cards: Sequence[ModelCard], clock: Callable[[], float] = time.monotonic) -> None:
        self.cards = {card.name: card for card in cards}
        self.models = [card.name for card in cards]
        self.states: list[ReplicaState | None] = []
        """By row; None: the row is free."""
        self.columns: NDArray[np.float64] = np.zeros((Column.COUNT, 8))
        """What decisions need of the replicas, by column and row."""
        self.num_full = 0
        """Replicas at which no more requests may wait."""
        self._row_of: dict[str, int] = {}
        self._free: list[int] = []
        self._members: dict[str, set[str]] = {name: set() for name in self.models}
        self._curves: dict[str, StepCurve] = {}
        self._reservations: dict[str, Reservation] = {}
        self._suspect_until: dict[str, float] = {}
        self._candidates: dict[tuple[str, ...], NDArray[np.intp]] = {}
        self._routed = 0
        self._clock = clock

    # --- which replicas there are ---------------------------------------------------------------------------------

    def set_replicas(self, model: str, replicas: Collection[str]) -> set[str]:
        """The replicas of `model` that Serve says are up; returns those that are new."""
        known, listed = self._members[model], set(replicas)
        for name in known - listed:
            self._drop(name)
        for name in listed - known:
            self._add(model, name)
        if known != listed:
            self._members[model] = listed
            self._candidates.clear()
        return listed - known

    def replicas(self, model: str) -> set[str]:
        """Those that are up."""
        return self._members[model]

    def candidates(self, models: tuple[str, ...]) -> NDArray[np.intp]:
        """Rows of the replicas of `models` that may get a request: those that are up and have not just failed, or all
        that are up if every one has failed."""
        if self._suspect_until:
            now = self._clock()
            for name in [name for name, until in self._suspect_until.items() if until <= now]:
                del self._suspect_until[name]
                self._candidates.clear()
        self._expire()
        found = self._candidates.get(models)
        if found is None:
            rows = []
            for model in models:
                trusted = [name for name in self._members[model] if name not in self._suspect_until]
                rows += [self._row_of[name] for name in trusted or self._members[model]]
            found = self._candidates[models] = np.array(sorted(rows), dtype=np.intp)
        return found

    def columns_of(self, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """The columns of some rows, [Column.COUNT, rows]; a view if the rows are all of a range."""
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows):  # they ascend, so none is missing in between
            return self.columns[:, first : last + 1]
        return self.columns[:, rows]

    def suspect(self, replica: str) -> None:
        """A request was lost there: the replica may be dead, and Serve may not know yet."""
        if replica in self._row_of:
            self._suspect_until[replica] = self._clock() + SUSPECT_SECONDS
            self._candidates.clear()

    def now(self) -> float:
        """Seconds of the fleet's clock."""
        return self._clock()

    def trusts(self, model: str) -> bool:
        """Whether a replica of it is up that has not just failed."""
        now = self._clock()
        return any(self._suspect_until.get(name, now) <= now for name in self._members[model])

    def row(self, replica: str) -> int | None:
        """Its row; None if it is not up."""
        return self._row_of.get(replica)

    def state(self, row: int) -> ReplicaState:
        """Of the replica in a row that is in use."""
        found = self.states[row]
        assert found is not None, f"row {row} is free"
        return found

    # --- load -----------------------------------------------------------------------------------------------------

    def report(self, replica: str, load: ReplicaLoad, accepted: Sequence[str] = ()) -> None:
        """Take in what a replica says of itself; what Serve does not list (any more) is ignored."""
        for request in accepted:
            self.release(request)
        index = self._row_of.get(replica)
        if index is None:
            return
        state = self.state(index)
        if not _plausible(load):
            load = msgspec.structs.replace(load, curve=None, residence=0.0)
        if load.curve is not None:
            shared = self._curves.get(state.card.name, load.curve)
            self._curves[state.card.name] = _mixed(shared, load.curve, _NEWS)
            state.curve = _mixed(load.curve, shared, _SHARED)
        elif state.curve is None:
            state.curve = self._curves.get(state.card.name)
        was_full = state.full
        state.load, state.reported = load, self._clock()
        self._update(index, state, was_full)

    def reserve(self, request: str, replica: str, tokens: int, *, yields: bool) -> None:
        """Count a request that is being sent; `tokens` are what is to be computed of it before its first token."""
        self.release(request)
        index = self._row_of.get(replica)
        if index is None:
            return
        self._reservations[request] = Reservation(replica, tokens, yields, self._clock())
        self._routed += 1
        self.state(index).last_routed = self._routed
        self._count(index, 1, tokens, yields)

    def release(self, request: str) -> None:
        """The request is part of the replica's own load now, or will never be."""
        held = self._reservations.pop(request, None)
        if held is not None:
            self._count(self._row_of[held.replica], -1, held.tokens, held.yields)

    @property
    def num_reserved(self) -> int:
        """Requests on their way to a replica."""
        return len(self._reservations)

    def check_integrity(self) -> None:
        """Raise AssertionError unless reservations, states and rows agree."""
        full = 0
        for name, index in self._row_of.items():
            state = self.state(index)
            held = [held for held in self._reservations.values() if held.replica == name]
            expected = (
                len(held),
                sum(each.tokens for each in held),
                sum(each.yields for each in held),
                sum(each.tokens for each in held if each.yields),
            )
            found = (state.sent, state.sent_tokens, state.yielding_sent, state.yielding_sent_tokens)
            assert found == expected, f"{name}: {found} was counted, the reservations say {expected}"
            assert tuple(self.columns[:, index].tolist()) == tuple(map(float, state.row())), (
                f"the row of {name} is stale"
            )
            full += state.full
        assert full == self.num_full, f"{self.num_full} replicas are counted as full, {full} are"
        assert sum(map(len, self._members.values())) == len(self._row_of), "a replica is lost or doubled"

    def _expire(self) -> None:
        """Release the reservations that nobody did."""
        limit = self._clock() - RESERVATION_SECONDS
        while self._reservations:
            oldest = next(iter(self._reservations))  # they are in the order in which they were made
            if self._reservations[oldest].made > limit:
                return
            self.release(oldest)

    def _count(self, index: int, sign: int, tokens: int, yields: bool) -> None:
        state = self.state(index)
        was_full = state.full
        state.count(sign, tokens, yields=yields)
        self._update(index, state, was_full)

    def _update(self, index: int, state: ReplicaState, was_full: bool) -> None:
        self.num_full += state.full - was_full
        self.columns[:, index] = state.row()

    def _add(self, model: str, name: str) -> None:
        if self._free:
            index = self._free.pop()
        else:
            index = len(self.states)
            self.states.append(None)
            if index == self.columns.shape[1]:
                self.columns = np.concatenate([self.columns, np.zeros_like(self.columns)], axis=1)
        state = ReplicaState(name, self.models.index(model), self.cards[model], self._curves.get(model))
        self.states[index] = state
        self._row_of[name] = index
        self._update(index, state, was_full=False)

    def _drop(self, name: str) -> None:
        index = self._row_of.pop(name)
        self.num_full -= self.state(index).full
        self.states[index] = None
        self._free.append(index)
        self._suspect_until.pop(name, None)
        for request in [key for key, held in self._reservations.items() if held.replica == name]:
            del self._reservations[request]


def _mixed(one: StepCurve, other: StepCurve, share: float) -> StepCurve:
    """`share` of the other curve in one."""
    return StepCurve(
        one.base + share * (other.base - one.base),
        one.prefill_token + share * (other.prefill_token - one.prefill_token),
        one.decode_row + share * (other.decode_row - one.decode_row),
    )


def _plausible(load: ReplicaLoad) -> bool:
    """One replica's nonsense (NaN, infinity, negative times) must not reach a comparison with others."""
    times = [load.residence]
    if load.curve is not None:
        times += [load.curve.base, load.curve.prefill_token, load.curve.decode_row]
    return all(0 <= seconds <= _LONGEST for seconds in times)
