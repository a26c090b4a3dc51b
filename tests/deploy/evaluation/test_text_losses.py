"""Perplexity, KL divergence and agreement are those computed from transformers' logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, load_reference, make_tiny_model
from torch import Tensor

from raytroupe.actors.local_engine import LocalEngine
from raytroupe.actors.sequence_scorer import SequenceScorer
from raytroupe.deploy.evaluation import text_losses
from raytroupe.deploy.evaluation.held_out_text import ScoredSequence
from raytroupe.deploy.evaluation.text_losses import TextLosses, compare_losses

STEP_TOKENS, STEP_ROWS = 32, 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models with different weights."""
    folders = [tmp_path_factory.mktemp("models") / name for name in ("llama", "mistral")]
    for folder in folders:
        make_tiny_model(folder.name, folder)
    return folders


@contextmanager
def scorer(folder: Path) -> Iterator[SequenceScorer]:
    with LocalEngine(
        folder,
        num_blocks=32,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=STEP_ROWS,
        max_num_batched_tokens=STEP_TOKENS,
        enable_prefix_caching=False,
    ) as engine:
        yield engine.shard.scorer()


@pytest.fixture(scope="module")
def sequences() -> list[ScoredSequence]:
    """Plain ones, chats, and one that takes several steps."""
    generator = torch.Generator().manual_seed(3)
    return [
        ScoredSequence(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(), first)
        for length, first in ((9, 1), (12, 7), (50, 20), (2, 1), (11, 1))
    ]


def log_probabilities(folder: Path, sequence: ScoredSequence) -> Tensor:
    """Of the scored tokens' distributions, by transformers."""
    with torch.inference_mode():
        logits = load_reference(folder)(torch.tensor([sequence.tokens])).logits[0]
    return logits.double()[sequence.first - 1 : -1].log_softmax(-1)


def test_losses_are_those_of_transformers(
    folders: list[Path], sequences: list[ScoredSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_losses, "ROWS", 5)  # so that a step's positions are cut
    advanced: list[int] = []
    with scorer(folders[0]) as base, scorer(folders[1]) as variant:
        losses = compare_losses(base, variant, sequences, STEP_TOKENS, STEP_ROWS, advanced.append)
    assert sum(advanced) == len(sequences)
    expected = TextLosses([], [], [], [], [])
    for sequence in sequences:
        p, q = (log_probabilities(folder, sequence) for folder in folders)
        targets = torch.tensor(sequence.tokens[sequence.first :])[:, None]
        expected.tokens.append(len(targets))
        expected.base.append(-p.gather(1, targets).sum().item())
        expected.variant.append(-q.gather(1, targets).sum().item())
        expected.kl_divergence.append((p.exp() * (p - q)).sum().item())
        expected.agreeing.append(int((p.argmax(-1) == q.argmax(-1)).sum()))
    assert losses.tokens == expected.tokens
    assert losses.agreeing == expected.agreeing
    for name in ("base", "variant", "kl_divergence"):
        assert getattr(losses, name) == pytest.approx(getattr(expected, name), rel=1e-4)


def test_a_model_does_not_differ_from_itself(folders: list[Path], sequences: list[ScoredSequence]) -> None:
    with scorer(folders[0]) as one, scorer(folders[0]) as other:
        losses = compare_losses(one, other, sequences, STEP_TOKENS, STEP_ROWS)
        alone = compare_losses(one, one, sequences, STEP_TOKENS, STEP_ROWS)
    assert losses == alone
    assert losses.base == losses.variant
    assert losses.kl_divergence == [0.0] * len(sequences)
    assert losses.agreeing == losses.tokens
