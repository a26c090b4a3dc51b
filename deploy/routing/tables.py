"""A fit as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from ...router.classifier import TokenCosts
from .cost_quality import Calibration, Estimate, Outcomes, RoutePoint

ROWS = 12
"""Of the curve's points that are shown."""


def model_table(
    names: Sequence[str], outcomes: Outcomes, prices: Sequence[TokenCosts], fits: dict[str, Calibration]
) -> Table:
    """A row per model: how good, how dear, how well predicted."""
    estimated = " (estimated)" if any(price.estimated for price in prices) else ""
    headings = ["model", "right", f"$ per M tokens in / out{estimated}", "$ per M requests", "cost"]
    table = _table(f"{len(outcomes.right)} questions", [*headings, "not worse", "Brier (of the mean)", "ECE"])
    best_cost = outcomes.cost[:, outcomes.best].mean()
    for column, name in enumerate(names):
        fit = fits.get(name)
        cost = outcomes.cost[:, column].mean()
        not_worse = outcomes.right[:, column] | ~outcomes.right[:, outcomes.best]
        table.add_row(
            name + (", the best" if column == outcomes.best else ""),
            f"{outcomes.right[:, column].mean():.2%}",
            f"{prices[column].prompt * 1e6:.3g} / {prices[column].output * 1e6:.3g}",
            f"{cost * 1e6:.3g}",
            f"{cost / best_cost:.1%}",
            f"{not_worse.mean():.2%}",
            f"{fit.brier:.4f} ({fit.base_brier:.4f})" if fit else "",
            f"{fit.expected_error:.4f}" if fit else "",
        )
    return table


def curve_table(title: str, names: Sequence[str], points: Sequence[RoutePoint], chosen: float) -> Table:
    """A row per threshold, the chosen one marked; quality and cost against the best model, the saving last."""
    table = _table(
        f"{title}; in brackets 95 % intervals",
        [
            "threshold",
            *(f"to {name}" for name in names),
            "quality",
            "random choice,\nsame cost",
            "cost",
            "saved",
            "saved against a\nrandom one as good",
        ],
    )
    for point in points:
        saved = Estimate(1 - point.cost.value, 1 - point.cost.high, 1 - point.cost.low)
        table.add_row(
            f"{point.threshold:.4f}{' *' if point.threshold == chosen else '  '}",
            *(f"{share:.1%}" for share in point.shares),
            _percent(point.quality),
            _percent(point.mixture_quality),
            f"{point.cost.value:.1%}",
            _percent(saved),
            _percent(point.saved),
        )
    return table


def some_points(points: Sequence[RoutePoint], chosen: float) -> list[RoutePoint]:
    """So many that a screen holds them: the chosen one and its neighbours, and others evenly by cost."""
    places = np.argsort([point.cost.value for point in points], kind="stable")
    costs = np.array([points[place].cost.value for place in places])
    wanted = np.linspace(costs[0], costs[-1], ROWS)
    picked = {int(places[np.abs(costs - cost).argmin()]) for cost in wanted}
    picked |= {place for place, point in enumerate(points) if point.threshold == chosen}
    return [points[place] for place in sorted(picked)]


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} \\[{estimate.low * 100:.1f} … {estimate.high * 100:.1f}]"


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    return table
