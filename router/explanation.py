"""A decision in words: a compact header for every response, and all candidates for whoever asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..cluster.latency_class import LatencyTargets
from .decision import Candidates, Decision
from .router import Router

_MAX_HEADER = 512


def route_header(decision: Decision) -> str:
    """The value of `x-troupe-route`."""
    parts = [f"model={decision.model}"]
    if decision.replica is not None:
        parts += [
            f"replica={decision.replica}",
            f"cached={decision.cached_tokens}/{decision.prompt.tokens}",
            f"ttft_ms={1000 * decision.ttft:.0f}",
        ]
    if decision.model in decision.choice.probabilities:
        parts.append(f"p={decision.choice.probabilities[decision.model]:.2f}")
    if decision.shadow is not None:
        parts.append(f"shadow={decision.shadow}")
    parts.append(f"reason={decision.reason}")
    text = "; ".join(parts).encode("ascii", "replace").decode()
    return "".join(character if character.isprintable() else "?" for character in text)[:_MAX_HEADER]


def explain(
    router: Router,
    decision: Decision,
    everyone: Candidates | None,
    members: Sequence[str],
    targets: LatencyTargets,
) -> dict[str, Any]:
    """The body of `POST /v1/route`: the decision and every candidate, the least cost first.

    Args:
        router: that decided.
        decision: what it decided.
        everyone: the replicas of all `members`, also of those that may not answer.
        members: the models that the client allows.
        targets: of the request.
    """
    excluded = decision.choice.excluded
    candidates = [] if everyone is None else _candidates(router, decision, everyone)
    known = {candidate["model"] for candidate in candidates}
    candidates += [
        {"model": model, "replica": None, "chosen": False, "excluded": excluded.get(model, "no replica is known yet")}
        for model in members
        if model not in known
    ]
    for candidate in candidates:
        candidate.setdefault("excluded", excluded.get(candidate["model"]))
        candidate["probability"] = decision.choice.probabilities.get(candidate["model"])
        candidate["accuracy"] = router.fleet.cards[candidate["model"]].accuracy
    return {
        "object": "route",
        "model": decision.model,
        "replica": decision.replica,
        "reason": decision.reason,
        "shadow": decision.shadow,
        "latency_class": targets.name,
        "targets": {"ttft_ms": 1000 * targets.ttft, "tpot_ms": 1000 * targets.tpot, "refuse_late": targets.refuse_late},
        "prompt_tokens": decision.prompt.tokens,
        "candidates": candidates,
    }


def _candidates(router: Router, decision: Decision, everyone: Candidates) -> list[dict[str, Any]]:
    found = []
    costs = everyone.costs
    for position in np.argsort(costs.cost, kind="stable").tolist():
        state = router.fleet.state(int(everyone.rows[position]))
        found.append(
            {
                "model": state.card.name,
                "replica": state.name,
                "chosen": state.name == decision.replica,
                "cached_tokens": int(everyone.cached[position]),
                "queued_tokens": state.queued_tokens,
                "running": state.load.running,
                "waiting": state.waiting,
                "ttft_ms": _rounded(1000 * costs.ttft[position]),
                "tpot_ms": _rounded(1000 * costs.tpot[position]),
                "price_dollars": float(costs.price[position]),
                "cost": _rounded(costs.cost[position]),
                "measured": state.curve is not None,
            }
        )
    return found


def _rounded(value: float) -> float | None:
    return round(float(value), 3) if math.isfinite(value) else None
