"""Losses of one or two models on the same sequences, from the logits at every position."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor

from ...actors.sequence_scorer import SequenceScorer, plan_scoring
from ...cluster.errors import EngineError
from .held_out_text import ScoredSequence

ROWS = 256
"""Positions whose logits are held at once: with a vocabulary of 150,000 they take 150 MB a copy."""


class TextLosses(msgspec.Struct):
    """Sums over the scored tokens of every sequence; losses in natural logarithms."""

    tokens: list[int]
    """Scored ones."""
    base: list[float]
    variant: list[float]
    kl_divergence: list[float]
    """KL(base || variant) of the distributions of the next token."""
    agreeing: list[int]
    """Positions where both have the same likeliest token, the lower id on a tie."""


@torch.inference_mode()
def compare_losses(
    base: SequenceScorer,
    variant: SequenceScorer,
    sequences: Sequence[ScoredSequence],
    max_tokens: int,
    max_rows: int,
    advance: Callable[[int], None] = lambda sequences: None,
) -> TextLosses:
    """Run every sequence through both models.

    Args:
        max_tokens: in a step.
        max_rows: sequences in a step.
        advance: called with the number of sequences that a step has begun.

    Raises:
        EngineError: logits are NaN or infinite.
    """
    count = len(sequences)
    losses = TextLosses([0] * count, [0.0] * count, [0.0] * count, [0.0] * count, [0] * count)
    tokens = [sequence.tokens for sequence in sequences]
    for step in plan_scoring(list(map(len, tokens)), max_tokens, max_rows):
        # (row of the step, sequence, token that follows) for every position whose next token counts
        scored: list[tuple[int, int, int]] = []
        row = 0
        for chunk in step:
            sequence = sequences[chunk.sequence]
            for position in range(chunk.start, chunk.stop):
                if sequence.first <= position + 1 < len(sequence.tokens):
                    scored.append((row, chunk.sequence, sequence.tokens[position + 1]))
                row += 1
        base_hidden = base.forward(step, tokens)
        variant_hidden = base_hidden if variant is base else variant.forward(step, tokens)
        for start in range(0, len(scored), ROWS):
            rows, owners, targets = zip(*scored[start : start + ROWS], strict=True)
            base_logits, variant_logits = base.logits(base_hidden, rows), variant.logits(variant_hidden, rows)
            if not (base_logits.isfinite().all() and variant_logits.isfinite().all()):
                raise EngineError("a model's logits are NaN or infinite on the held-out text; it cannot be evaluated")
            for owner, *figures in zip(owners, *_figures(base_logits, variant_logits, targets), strict=True):
                losses.tokens[owner] += 1
                losses.base[owner] += figures[0]
                losses.variant[owner] += figures[1]
                losses.kl_divergence[owner] += figures[2]
                losses.agreeing[owner] += int(figures[3])
        advance(sum(chunk.start == 0 for chunk in step))
    return losses


def _figures(base_logits: Tensor, variant_logits: Tensor, targets: Sequence[int]) -> list[list[float]]:
    """For every row: both losses of the target, the KL divergence, whether the likeliest tokens agree."""
    base, variant = base_logits.log_softmax(-1), variant_logits.log_softmax(-1)
    index = torch.tensor(targets, dtype=torch.int64, device=base.device)[:, None]
    divergence = (base.exp() * (base - variant)).sum(-1, dtype=torch.float64)
    agree = base.argmax(-1) == variant.argmax(-1)
    columns = (-base.gather(1, index)[:, 0], -variant.gather(1, index)[:, 0], divergence, agree)
    return [column.tolist() for column in columns]
