"""Greedy answers of transformers to a mixed-length batch, which the engine must give in every way of running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from .tiny_models import VOCAB_SIZE, load_reference, make_tiny_model

LENGTHS = (3, 50, 17, 33, 64, 1)
NEW_TOKENS = 64
LONGEST = max(LENGTHS) + NEW_TOKENS


@dataclasses.dataclass(frozen=True)
class FamilyReference:
    """A tiny model and transformers' greedy answers, each prompt run alone."""

    folder: Path
    prompts: list[list[int]]
    answers: list[list[int]]


@cache
def family_reference(family: str, root: Path) -> FamilyReference:
    """Write the tiny model of `family` under `root` and let transformers answer; once per family and root."""
    return make_reference(family, root)


def make_reference(
    family: str,
    root: Path,
    *,
    device: torch.device | None = None,
    lengths: Sequence[int] = LENGTHS,
    new_tokens: int = NEW_TOKENS,
) -> FamilyReference:
    """The same for other prompts, on another device than the CPU."""
    folder = make_tiny_model(family, root / family)
    model = load_reference(folder, device)
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    answers = []
    for prompt in prompts:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt], device=model.device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
            )
        answers.append(output[0, len(prompt) :].tolist())
    return FamilyReference(folder, prompts, answers)
