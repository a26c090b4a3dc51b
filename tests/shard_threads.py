"""The shards of a replica as threads of one process, for tests that compare them with one shard."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from paged_batch import random_sequences, run_shard
from tiny_models import VOCAB_SIZE
from torch import Tensor

from raytroupe.actors.collectives import SingleShard
from raytroupe.cluster.topology import ShardLayout, all_layouts

STEPS = [[(0, 0, 9), (1, 0, 30)], [(0, 9, 1), (1, 30, 21)], [(0, 10, 1), (1, 51, 1)]]
"""(sequence, first position, tokens) of every row."""
SEQUENCES = random_sequences([11, 52], VOCAB_SIZE)


class Replica:
    """What the shards of a replica share when each runs in a thread of this process."""

    def __init__(self, layouts: list[ShardLayout]) -> None:
        tp = layouts[0].tp_size
        self.barriers = [threading.Barrier(tp, timeout=30) for _ in range(layouts[0].pp_size)]
        self.parts: list[Tensor] = [torch.empty(0)] * len(layouts)
        self.hand_over = [queue.SimpleQueue() for _ in layouts]


class ThreadCollectives:
    """The protocol of `actors/collectives.py` between threads."""

    def __init__(self, layout: ShardLayout, replica: Replica) -> None:
        self._layout, self._replica = layout, replica

    def _exchange(self, x: Tensor) -> list[Tensor]:
        layout, replica = self._layout, self._replica
        replica.parts[layout.rank] = x.clone()
        replica.barriers[layout.pp_rank].wait()
        first = layout.pp_rank * layout.tp_size
        parts = list(replica.parts[first : first + layout.tp_size])
        replica.barriers[layout.pp_rank].wait()
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._exchange(x)).sum(0))

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), -1)

    def send_hidden(self, hidden: Tensor) -> None:
        self._replica.hand_over[self._layout.rank + self._layout.tp_size].put(hidden.clone())

    def recv_hidden(self, into: Tensor) -> Tensor:
        return into.copy_(self._replica.hand_over[self._layout.rank].get(timeout=30))

    def close(self) -> None:
        pass


def assert_equals_one_shard(
    folder: Path, tp: int, pp: int, way: str = "recorded", *, reference: str = "torch", tolerance: float = 1e-4
) -> None:
    """The logits of all steps are those of one shard that runs in the way `reference`, within `tolerance`."""
    expected = run_shard(folder, ShardLayout(), SingleShard(), SEQUENCES, STEPS, reference)
    layouts = all_layouts(tp, pp)
    replica = Replica(layouts)
    with ThreadPoolExecutor(len(layouts)) as pool:
        results = list(
            pool.map(lambda it: run_shard(folder, it, ThreadCollectives(it, replica), SEQUENCES, STEPS, way), layouts)
        )
    for layout, logits in zip(layouts, results, strict=True):
        assert len(logits) == (len(STEPS) if layout.last_stage else 0)
        for mine, whole in zip(logits, expected, strict=layout.last_stage):
            torch.testing.assert_close(mine, whole, rtol=0, atol=tolerance)
