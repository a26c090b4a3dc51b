"""`troupe explain` shows a decision in a terminal of the usual width."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from raytroupe.deploy.routing.explain import candidate_table


def candidate(model: str, replica: str | None, **fields: Any) -> dict[str, Any]:
    return {
        "model": model, "replica": replica, "chosen": False, "cached_tokens": 12_345, "queued_tokens": 6_789,
        "running": 128, "waiting": 96, "ttft_ms": 1_234.5, "tpot_ms": 123.4, "price_dollars": 0.0001234,
        "cost": 1.234, "probability": None, "excluded": None, **fields,
    }  # fmt: skip


def shown(*candidates: dict[str, Any]) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(candidate_table({"candidates": list(candidates)}))
    return capture.get()


@pytest.mark.parametrize("probability", [None, 0.93])
def test_nothing_is_cut_off_at_80_columns(probability: float | None) -> None:
    found = shown(candidate("qwen3-8b-int4", "t9x6eujg", chosen=True, probability=probability))
    assert "…" not in found
    for text in ("→", "qwen3-8b-int4", "t9x6eujg", "12345", "6789", "128", "96", "1234.5", "123.4", "1.234"):
        assert text in found
    assert ("0.93" in found) == (probability is not None)


def test_a_model_without_a_replica_has_a_row() -> None:
    missing = {name: None for name in candidate("", None) if name not in ("model", "excluded")}
    assert "–" in shown({**missing, "model": "large", "excluded": "no replica is known yet"})
