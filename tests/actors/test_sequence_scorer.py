"""Scored sequences have the logits that transformers gives them, however they are cut into steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, load_reference, make_tiny_model

from raytroupe.actors.local_engine import LocalEngine
from raytroupe.actors.sequence_scorer import Chunk, plan_scoring


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "mistral"
    make_tiny_model("mistral", path)
    return path


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "max_rows"),
    [([3, 4, 5], 12, 4), ([3, 4, 5], 11, 4), ([3, 4, 5], 100, 1), ([9, 20, 1, 2], 8, 4), ([17], 8, 1), ([], 8, 1)],
)
def test_steps_cover_every_position_once_in_order_and_within_the_limits(
    lengths: list[int], max_tokens: int, max_rows: int
) -> None:
    steps = plan_scoring(lengths, max_tokens, max_rows)
    computed = [0] * len(lengths)
    for step in steps:
        counts = [chunk.stop - chunk.start for chunk in step]
        assert sum(counts) <= max_tokens
        assert len(step) <= max_rows
        assert counts[: counts.count(1)] == [1] * counts.count(1), "rows of one token come first"
        for chunk in step:
            assert chunk.start == computed[chunk.sequence]
            assert chunk.start == 0 or step == [chunk], "a later chunk finds its sequence's blocks where they were"
            computed[chunk.sequence] = chunk.stop
    assert computed == lengths


@pytest.mark.parametrize("max_tokens", [16, 64, 128])
def test_logits_are_those_of_transformers(folder: Path, max_tokens: int) -> None:
    generator = torch.Generator().manual_seed(5)
    sequences = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (33, 7, 1, 49, 12)]
    reference = load_reference(folder)
    with LocalEngine(
        folder,
        num_blocks=64,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=max_tokens,
        enable_prefix_caching=False,
    ) as engine:
        scorer = engine.shard.scorer()
        for step in plan_scoring(list(map(len, sequences)), max_tokens, 4):
            hidden = scorer.forward(step, sequences)
            logits = scorer.logits(hidden, range(len(hidden))).clone()
            for chunk, part in zip(step, logits.split([c.stop - c.start for c in step]), strict=True):
                with torch.inference_mode():
                    expected = reference(torch.tensor([sequences[chunk.sequence]])).logits[0, chunk.start : chunk.stop]
                torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-3)


def test_long_sequence_has_steps_of_its_own() -> None:
    assert plan_scoring([4, 10, 4], 8, 4) == [
        [Chunk(0, 0, 4)],
        [Chunk(1, 0, 8)],
        [Chunk(1, 8, 10)],
        [Chunk(2, 0, 4)],
    ]
