"""How many replicas a model should have, from what its replicas predict and measure. Plain decisions, no clock.

**Up.** A class of requests waits too long if the wait that its replicas predict is more than a share of its target.
Requests go where the queue is short, so what counts is the median replica (the lower one of two): one replica with a
long queue is the router's business. Then as many replicas are wanted as make the queued seconds of all of them fit:

    ceil(sum of the waits of all replicas / (share · target))

The same if they are too busy, though nobody waits yet: `ceil(sum of utilisations / HIGH)`. A queue may promise more
than there is: new replicas take new requests, not the queue that has formed while they start. So there are at most
twice as many as are ready, and what they change is seen before more are started.

**Down.** The fewest replicas that all of the work would fit into, the waits as above and utilisations with a margin
(LOW instead of HIGH), is noted with every decision. The number falls to the largest of these notes over
`settle_seconds`, so neither a short lull nor noise around a limit starts and stops replicas.

Replicas that have not reported yet count as full for going down, and not at all for going up. If none has reported,
the number stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

QUEUE_METRIC = "queue_seconds_"
"""With the name of a latency class behind it: a replica's predicted queue, as it reports it to Serve."""
UTILISATION_METRIC = "utilisation"

HIGH, LOW = 0.8, 0.6
"""Utilisation of a replica, above which more are started, and which fewer must not exceed."""
GROWTH = 2
"""How many times as many replicas as are ready there may be, with those that start."""


class ScalingRules(msgspec.Struct, frozen=True):
    """What a user decides."""

    targets: dict[str, float]
    """Seconds from arrival to the first token, by latency class."""
    share: float = 0.5
    """Part of a target that waiting may take; the rest is for the request's own prompt, and for noticing in time."""
    settle_seconds: float = 60.0
    """How long fewer replicas must have been enough."""


class Observation(msgspec.Struct, frozen=True):
    """One model at one moment; all values smoothed over some seconds."""

    now: float
    """Seconds of a clock, the same in every observation."""
    target: int
    """Replicas that were decided on last."""
    ready: int
    """Replicas that serve."""
    waits: Mapping[str, Sequence[float]]
    """Predicted queue seconds by latency class, one value for each replica that knows."""
    utilisation: Sequence[float]
    """Of each replica that has reported (`cluster/utilisation.py`)."""


class ScalingState(msgspec.Struct, frozen=True):
    """What one decision tells the next."""

    since: float | None = None
    """Time of the first observation."""
    notes: tuple[tuple[float, int], ...] = ()
    """(time, replicas that were enough then), oldest first. A note with a larger one after it can never be the largest
    of a period that lasts until now, so it is dropped: the numbers fall."""


def decide(
    seen: Observation, least: int, most: int, rules: ScalingRules, state: ScalingState
) -> tuple[int, ScalingState]:
    """Replicas that there should be, from `least` to `most`, and the state for the next decision."""
    current = min(most, max(least, seen.target))
    state = _note(state, seen.now, min(most, max(least, _enough(seen, current, rules))), rules.settle_seconds)
    more = min(_wanted(seen, rules), max(seen.ready + 1, GROWTH * seen.ready), most)
    if more > current:
        return more, state
    assert state.since is not None
    if seen.now - state.since < rules.settle_seconds:
        return current, state
    return min(current, state.notes[0][1]), state


def replica_metrics(waits: Mapping[str, float], utilisation: float) -> dict[str, float]:
    """What a replica reports (`SchedulerReplica.record_autoscaling_stats`), from its queue seconds by class."""
    return {UTILISATION_METRIC: utilisation, **{QUEUE_METRIC + name: seconds for name, seconds in waits.items()}}


def _wanted(seen: Observation, rules: ScalingRules) -> int:
    """Replicas that what waits and what is computed asks for; 0: no more than there are."""
    wanted = 0
    for name, waits in seen.waits.items():
        allowed = rules.share * rules.targets[name]
        if waits and sorted(waits)[(len(waits) - 1) // 2] > allowed:
            wanted = max(wanted, math.ceil(sum(waits) / allowed))
    busy = [min(1.0, one) for one in seen.utilisation]
    if busy and sum(busy) > HIGH * len(busy):
        wanted = max(wanted, math.ceil(sum(busy) / HIGH))
    return wanted


def _enough(seen: Observation, current: int, rules: ScalingRules) -> int:
    """The fewest replicas that the work of all fits into."""
    silent = seen.ready - len(seen.utilisation)
    if not seen.utilisation:
        return current
    busy = sum(min(1.0, one) for one in seen.utilisation) + silent
    waiting = (sum(waits) / (rules.share * rules.targets[name]) for name, waits in seen.waits.items())
    return math.ceil(max(busy / LOW, *waiting, 0.0))


def _note(state: ScalingState, now: float, enough: int, settle_seconds: float) -> ScalingState:
    """The state with one more note, and without those that have no say any more."""
    if state.since is None or any(time > now for time, _ in state.notes):  # the first, or the clock was set back
        return ScalingState(now, ((now, enough),))
    kept = [note for note in state.notes if note[1] > enough and now - note[0] < settle_seconds]
    return ScalingState(state.since, (*kept, (now, enough)))
