"""Mixture of experts: routing (arXiv:2101.03961, arXiv:2401.04088) and the experts' gated MLPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .interface import ExpertWeights, Kernels


def route(logits: Tensor, experts_per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The experts of every token and their weights.

    Args:
        logits: [T, num_experts].
        normalize: scale a token's weights to sum to 1.

    Returns:
        weights [T, experts_per_token] float32, from a softmax over all experts; ids of the same shape, int64.
    """
    weights, ids = torch.softmax(logits.float(), -1).topk(experts_per_token, dim=-1)
    if normalize:
        weights /= weights.sum(-1, keepdim=True)
    return weights, ids


def run_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gated: Sequence[Callable[[Tensor], Tensor]],
    down: Sequence[Callable[[Tensor], Tensor]],
) -> Tensor:
    """The weighted sum of each token's experts; tokens are grouped by expert, so that each is one product.

    Args:
        x: [T, hidden].
        weights, ids: [T, experts per token], from `route`.
        gated, down: the two products of every expert, [T, hidden] → [T, width] → [T, hidden].

    Returns:
        [T, hidden], a new tensor.
    """
    order = ids.flatten().argsort(stable=True)
    tokens = order // ids.shape[1]
    counts = torch.bincount(ids.flatten(), minlength=len(gated)).tolist()
    grouped = x[tokens]
    results = torch.empty_like(grouped)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = slice(start, start + count)
        results[rows] = down[expert](gated[expert](grouped[rows]))
        start += count
    results *= weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add_(0, tokens, results)


class ProductsOfExperts:
    """The experts of a layer, each with its own two products; see `interface.Kernels.experts`."""

    def __init__(self, kernels: Kernels, gate_up: ExpertWeights, down: ExpertWeights, activation: str) -> None:
        self._gated = [kernels.gated_linear(expert, None, activation) for expert in gate_up]
        self._down = [kernels.linear(expert) for expert in down]

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return run_experts(x, weights, ids, self._gated, self._down)
