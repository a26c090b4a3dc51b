"""Model cards, loads and a clock for tests of routing."""

from __future__ import annotations

from typing import Any

from raytroupe.cluster.messages import ModelCard
from raytroupe.cluster.replica_report import ReplicaLoad, StepCurve

CURVE = StepCurve(0.01, 0.0001, 0.002)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def card(name: str, **fields: Any) -> ModelCard:
    """A small model, but for `fields`."""
    return ModelCard(**{"name": name, "path": "", "max_model_len": 4096, "vocab_size": 9, **fields})


def load(**fields: Any) -> ReplicaLoad:
    """Of an idle replica, but for `fields`."""
    values = dict.fromkeys(ReplicaLoad.__struct_fields__, 0)
    values |= {"free_blocks": 9, "total_blocks": 9, "max_num_seqs": 4, "max_num_batched_tokens": 64, "curve": CURVE}
    return ReplicaLoad(**{**values, **fields})
