"""The experts of every token; see `kernels/moe.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def route_kernel(
    logits_ptr, weights_ptr, ids_ptr, logits_stride, num_experts,
    NORMALIZE: tl.constexpr, EXPERTS_PER_TOKEN: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token. SLOTS: experts per token, up to a power of two."""
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK)
    exists = experts < num_experts
    logits = tl.load(logits_ptr + token * logits_stride + experts, mask=exists, other=float("-inf")).to(tl.float32)
    exponentials = tl.exp(logits - tl.max(logits, 0))
    probabilities = exponentials / tl.sum(exponentials, 0)
    # With a NaN among the logits all probabilities are NaN, and so are the weights, but the ids are experts.
    rest = tl.where(exists, tl.where(probabilities == probabilities, probabilities, 0.0), -1.0)
    slots = tl.arange(0, SLOTS)
    weights = tl.zeros((SLOTS,), tl.float32)
    ids = tl.zeros((SLOTS,), tl.int32)
    for slot in range(EXPERTS_PER_TOKEN):
        chosen = tl.min(tl.where(rest == tl.max(rest, 0), experts, BLOCK), 0)
        weight = tl.sum(tl.where(experts == chosen, probabilities, 0.0), 0)
        weights = tl.where(slots == slot, weight, weights)
        ids = tl.where(slots == slot, chosen, ids)
        rest = tl.where(experts == chosen, -1.0, rest)
    if NORMALIZE:
        weights /= tl.sum(weights, 0)
    mask = slots < EXPERTS_PER_TOKEN
    tl.store(weights_ptr + token * EXPERTS_PER_TOKEN + slots, weights, mask=mask)
    tl.store(ids_ptr + token * EXPERTS_PER_TOKEN + slots, ids, mask=mask)


def route(logits: Tensor, experts_per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The experts of every token and their weights.

    Args:
        logits: [T, num_experts], whose rows are contiguous.
        normalize: scale a token's weights to sum to 1.

    Returns:
        weights [T, experts_per_token] float32, from a softmax over all experts, the largest first, of equals the one
        of the lower id; ids of the same shape, int32.
    """
    tokens, num_experts = logits.shape
    assert experts_per_token <= num_experts
    assert logits.stride(1) == 1
    weights = torch.empty(tokens, experts_per_token, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, experts_per_token, dtype=torch.int32, device=logits.device)
    route_kernel[(tokens,)](
        logits, weights, ids, logits.stride(0), num_experts, NORMALIZE=normalize, EXPERTS_PER_TOKEN=experts_per_token,
        SLOTS=triton.next_power_of_2(experts_per_token), BLOCK=triton.next_power_of_2(num_experts), num_warps=1,
    )  # fmt: skip
    return weights, ids
