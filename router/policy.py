"""The decision: which replica of the models that may answer gets a request, and why.

rule ─▶ classifier ─▶ models that are good enough ─▶ replicas that are up and not full ─▶ least cost (`router/cost.py`)
└──── router/variants.py ────┘

Pure functions of what is known: nothing is sent, counted or awaited here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cluster.errors import InvalidRequest, TargetUnreachable
from ..cluster.latency_class import EXPLICIT, LatencyTargets
from ..cluster.queue_time import retry_seconds
from ..cluster.router_config import CostWeights
from .cost import Costs, Floats, evaluate
from .decision import Candidates, Choice, Decision, Prompt
from .fleet import Fleet
from .replica_state import Column

TIE = 0.02
"""Candidates whose cost is this close to the best (a share of it) are equal: the one that was chosen longest ago wins,
so that idle replicas take turns."""


def decide(
    fleet: Fleet,
    choice: Choice,
    prompts: Mapping[str, Prompt],
    output_tokens: float,
    targets: LatencyTargets,
    weights: CostWeights,
    *,
    session_model: str | None = None,
    fallbacks: Sequence[str] = (),
) -> Decision:
    """Choose among the replicas of `choice.models`.

    Args:
        fleet: the replicas and their load.
        choice: the models that are good enough, best first.
        prompts: of every model in `choice.models` and `fallbacks`.
        output_tokens: that are expected.
        targets: of the request.
        weights: of the cost's terms.
        session_model: which answered the request's session before.
        fallbacks: models that answer when no replica of the others is up, best first.

    Raises:
        TargetUnreachable: no replica can meet the target now, and the class refuses late answers.
        InvalidRequest: an explicit target that even an idle replica cannot meet.
    """
    models, reason = choice.models, choice.reason
    if not any(fleet.replicas(model) for model in models):
        models = tuple(model for model in fallbacks if fleet.replicas(model))[:1]
        reason = f"{', '.join(choice.models)} down: next best"
    found = weigh(fleet, models, prompts, output_tokens, targets, weights, session_model)
    if found is None:
        model = choice.models[0]
        reason = f"{choice.reason}; no replica of it is known yet"
        return Decision(model=model, reason=reason, choice=choice, prompt=prompts[model])
    if targets.name == EXPLICIT and targets.refuse_late:
        _check_possible(fleet, found, targets)
    costs = found.costs
    cost = _allowed(fleet, found, targets)
    least = int(cost.argmin())
    ties = np.flatnonzero(cost <= cost[least] + TIE * abs(cost[least])).tolist()
    rows = found.rows
    chosen = ties[0]
    if len(ties) > 1:
        chosen = min(ties, key=lambda position: fleet.state(int(rows[position])).last_routed)
    state = fleet.state(int(rows[chosen]))
    model, cached = state.card.name, int(found.cached[chosen])
    return Decision(
        model=model,
        replica=state.name,
        reason=f"{reason}; {_replica_reason(found, prompts[model], cached)}",
        choice=choice,
        prompt=prompts[model],
        cached_tokens=cached,
        ttft=float(costs.ttft[chosen]),
        tpot=float(costs.tpot[chosen]),
        price=float(costs.price[chosen]),
        candidates=found,
    )


def weigh(
    fleet: Fleet,
    models: tuple[str, ...],
    prompts: Mapping[str, Prompt],
    output_tokens: float,
    targets: LatencyTargets,
    weights: CostWeights,
    session_model: str | None = None,
) -> Candidates | None:
    """What a request would cost on each replica of `models`; None if there is none. Arguments as those of `decide`."""
    rows = fleet.candidates(models)
    if not len(rows):
        return None
    columns = fleet.columns_of(rows)
    lengths, cached = _prompt_lengths(fleet, columns, rows, models, prompts)
    costs = evaluate(
        columns,
        lengths,
        lengths - cached,
        output_tokens,
        targets,
        weights,
        now=fleet.now(),
        session_model=fleet.models.index(session_model) if session_model in fleet.cards else None,
        copies_wanted=max(prompts[model].copies_wanted for model in models),
    )
    return Candidates(rows, lengths, cached, costs)


def _prompt_lengths(
    fleet: Fleet, columns: Floats, rows: NDArray[np.intp], models: tuple[str, ...], prompts: Mapping[str, Prompt]
) -> tuple[Floats, Floats]:
    """Per candidate: tokens of the prompt, and how many of them its cache holds."""
    lengths = np.empty(len(rows))
    warm = np.zeros(fleet.columns.shape[1])  # tokens, by row
    first = prompts[models[0]]
    if all(prompts[model] is first for model in models):
        lengths.fill(first.tokens)
    else:
        of_model = columns[Column.MODEL]
        for model in models:
            lengths[of_model == fleet.models.index(model)] = prompts[model].tokens
    anywhere = False
    for prompt in {id(prompts[model]): prompts[model] for model in models}.values():
        for replica, blocks in prompt.overlaps.items():
            if (row := fleet.row(replica)) is None:  # the index is behind
                continue
            card = fleet.state(row).card
            if prompts.get(card.name) is prompt:
                # The last token is always computed: the next one is sampled from its logits.
                warm[row] = min(blocks, (prompt.tokens - 1) // card.block_size) * card.block_size
                anywhere = True
    return lengths, warm[rows] if anywhere else np.zeros(len(rows))


def _allowed(fleet: Fleet, found: Candidates, targets: LatencyTargets) -> Floats:
    """The candidates' costs, infinite for those that may not get the request. Raises as `decide` does."""
    costs: Costs = found.costs
    cost = costs.cost
    if fleet.num_full:
        full = np.array([fleet.state(row).full for row in found.rows.tolist()])
        if not full.all():  # else a scheduler decides, which knows whether there is room by now
            cost = np.where(full, np.inf, cost)
    if targets.refuse_late and float(costs.ttft.max()) > targets.ttft:
        late = costs.ttft > targets.ttft
        with_room = np.isfinite(cost)
        cost = np.where(late, np.inf, cost)
        if np.isinf(cost).all():
            wait = float(costs.ttft[with_room].min())
            raise TargetUnreachable(
                f"the first token is predicted after {wait:.3g} s at best, and the target of class {targets.name} is "
                f"{targets.ttft:g} s; try again later or with a larger target",
                retry_after=retry_seconds(wait - targets.ttft),
            )
    return cost


def _check_possible(fleet: Fleet, found: Candidates, targets: LatencyTargets) -> None:
    """Refuse explicit targets below what an idle replica with a warm cache takes, as far as that was measured."""
    states = [fleet.state(row) for row in found.rows.tolist()]
    curves: list[Any] = [state.load.curve or state.curve for state in states]
    if None in curves:
        return
    fastest_first = min(curve.seconds(1, 0) for curve in curves)
    fastest_next = min(curve.seconds(0, 1) for curve in curves)
    for name, target, fastest in (("ttft", targets.ttft, fastest_first), ("tpot", targets.tpot, fastest_next)):
        if target < fastest:
            raise InvalidRequest(
                f"x-{name}-target-ms = {1000 * target:g} is impossible here: an idle replica takes at least "
                f"{1000 * fastest:.1f} ms",
                param=f"x-{name}-target-ms",
            )


def _replica_reason(found: Candidates, prompt: Prompt, cached: int) -> str:
    """Why this replica, in a few words."""
    if len(found.rows) == 1:
        return "the only replica"
    if not prompt.overlaps:
        return "least loaded"
    most = int(found.cached.max())
    if most > cached:
        return f"spilled over: a replica with {most} tokens cached is too busy"
    return f"warm cache ({cached} tokens)" if cached else "least loaded"
