"""Mixture of experts: routing (arXiv:2101.03961, arXiv:2401.04088) and the experts' gated MLPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activation import gated_activation
from .linear import Linear


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
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Sequence[Linear], down: Sequence[Linear], activation: str
) -> Tensor:
    """The weighted sum of each token's experts; tokens are grouped by expert, so that each is one product.

    Args:
        x: [T, hidden].
        weights, ids: [T, experts per token], from `route`.
        gate_up, down: one product per expert, [T, hidden] → [T, 2 * width] and [T, width] → [T, hidden].

    Returns:
        [T, hidden], a new tensor.
    """
    order = ids.flatten().argsort(stable=True)
    tokens = order // ids.shape[1]
    counts = torch.bincount(ids.flatten(), minlength=len(gate_up)).tolist()
    grouped = x[tokens]
    results = torch.empty_like(grouped)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = slice(start, start + count)
        results[rows] = down[expert](gated_activation(gate_up[expert](grouped[rows]), activation))
        start += count
    results *= weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add_(0, tokens, results)
