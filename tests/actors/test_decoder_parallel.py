"""Sharded decoders give the whole decoder's logits, for every family and every way to cut."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from paged_batch import CPU, random_sequences, run_shard
from tiny_models import FAMILIES, VOCAB_SIZE, make_tiny_model
from torch import Tensor

from raytroupe.actors.collectives import SingleShard
from raytroupe.actors.weights import load_weights
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.topology import ShardLayout, all_layouts, weight_bytes

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


def assert_equals_one_shard(folder, tp: int, pp: int, way: str = "recorded") -> None:
    expected = run_shard(folder, ShardLayout(), SingleShard(), SEQUENCES, STEPS, "torch")
    layouts = all_layouts(tp, pp)
    replica = Replica(layouts)
    with ThreadPoolExecutor(len(layouts)) as pool:
        results = list(
            pool.map(lambda it: run_shard(folder, it, ThreadCollectives(it, replica), SEQUENCES, STEPS, way), layouts)
        )
    for layout, logits in zip(layouts, results, strict=True):
        assert len(logits) == (len(STEPS) if layout.last_stage else 0)
        for mine, whole in zip(logits, expected, strict=layout.last_stage):
            torch.testing.assert_close(mine, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_by_two_shards_equal_one(family, tmp_path):
    assert_equals_one_shard(make_tiny_model(family, tmp_path), tp=2, pp=2)


@pytest.mark.parametrize("way", ["torch", "native"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "qwen2_moe"])
def test_whichever_way_a_layer_runs(family, way, tmp_path):
    assert_equals_one_shard(make_tiny_model(family, tmp_path), tp=2, pp=2, way=way)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "olmo2", "qwen2_moe"])
def test_kv_heads_are_replicated_where_shards_outnumber_them(family, tmp_path):
    folder = make_tiny_model(family, tmp_path)
    assert_equals_one_shard(folder, tp=4, pp=1)


@pytest.mark.parametrize("pp", [3, 4])
def test_layers_that_do_not_divide_evenly(pp, tmp_path):
    assert_equals_one_shard(make_tiny_model("llama3", tmp_path), tp=1, pp=pp)


@pytest.mark.parametrize("family", ["llama", "llama3", "gemma2", "qwen2_moe", "phi3"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 1)])
def test_the_planner_knows_how_many_bytes_a_shard_loads(family, tp, pp, tmp_path):
    folder = make_tiny_model(family, tmp_path)
    spec = load_spec(folder)
    for layout in all_layouts(tp, pp):
        totals: list[int] = []
        load_weights(folder, spec, layout, torch.float32, CPU, lambda _, total, to=totals: to.append(total))
        norms_and_biases = totals[-1] - weight_bytes(spec, layout, 4)
        assert 0 <= norms_and_biases < 0.08 * totals[-1]
