"""Tuning of the grouped products of mixtures of experts."""

from __future__ import annotations

import dataclasses
import functools

import torch

from ....kernels.gpu.activation import ACTIVATIONS
from ....kernels.gpu.expert_sort import sort_by_expert
from ....kernels.gpu.moe import BLOCK_ROWS, GroupedConfig, block_rows, candidates, grouped_linear
from ....kernels.gpu.tuning import dtype_name
from .timing import median_seconds, sets_beyond_cache
from .tuning_search import Task, Tuned, describe, entry_of, fastest, or_never

REPEATS = 5
TYPICAL = {16: 2, 32: 24, 64: 128, 128: 512}
"""Rows of a block → assignments per expert that stand for those it is used for."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The experts of a layer."""

    num_experts: int
    experts_per_token: int
    hidden: int
    width: int
    dtype: torch.dtype = torch.bfloat16


MIXTURES = (Mixture(128, 8, 2048, 768), Mixture(8, 2, 4096, 14_336))
"""Of Qwen3-30B-A3B and Mixtral-8x7B."""


def expert_tasks() -> list[Task]:
    """Both products for all sizes of blocks."""
    return [
        functools.partial(tune_grouped, mixture, rows, gated)
        for mixture in MIXTURES
        for rows, _ in BLOCK_ROWS
        for gated in (True, False)
    ]


def tune_grouped(mixture: Mixture, block_m: int, gated: bool, device: torch.device, deadline: float) -> Tuned:
    """The fastest configuration of one grouped product, with every expert equally likely."""
    assignments = TYPICAL[block_m] * mixture.num_experts
    assert block_rows(assignments, mixture.num_experts) == block_m
    tokens = assignments // mixture.experts_per_token
    outputs, inputs = (mixture.width, mixture.hidden) if gated else (mixture.hidden, mixture.width)
    shape = (mixture.num_experts, outputs * (2 if gated else 1), inputs)
    size = shape[0] * shape[1] * shape[2] * mixture.dtype.itemsize
    weights = [torch.randn(shape, dtype=mixture.dtype, device=device) for _ in range(sets_beyond_cache(size, device))]
    scores = torch.rand(tokens, mixture.num_experts, device=device)
    ids = scores.topk(mixture.experts_per_token, dim=1).indices.to(torch.int32)
    order = sort_by_expert(ids, mixture.num_experts, block_m)
    x = torch.randn(tokens if gated else assignments, inputs, dtype=mixture.dtype, device=device)
    out = x.new_empty(assignments, outputs)
    scale = None if gated else torch.rand(assignments, device=device)

    def seconds(config: GroupedConfig) -> float:
        calls = [
            functools.partial(
                grouped_linear, x, weight, out, order, config, scale=scale,
                assignments_per_row=mixture.experts_per_token if gated else 1,
                activation=ACTIVATIONS["silu"] if gated else None,
            )
            for weight in weights
        ]  # fmt: skip
        return or_never(lambda: median_seconds(calls, device, repeats=REPEATS).seconds)

    best = fastest(candidates(block_m, mixture.dtype, gated=gated), seconds, deadline)
    taken = seconds(best)
    kernel = "experts_gate_up" if gated else "experts_down"
    row = {
        "kernel": f"{kernel}, blocks of {block_m}", "outputs": outputs, "inputs": inputs, "rows": assignments,
        "config": describe(best), "ours": taken * 1e6, "bandwidth": size / taken / 1e9,
    }  # fmt: skip
    exact: dict[str, str | int] = {"dtype": dtype_name(mixture.dtype), "block_m": block_m}
    return Tuned(kernel, entry_of(exact, {"outputs": outputs, "inputs": inputs}, best), [row])
