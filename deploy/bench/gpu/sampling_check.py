"""The device's sampler against the one on the host: the same tokens and log-probabilities for mixed rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ....actors.sampling_table import SamplingTable
from ....cluster.request import SamplingParams
from ....kernels.gpu.sampling import DeviceSampler
from ....kernels.sampling import sample
from ....kernels.uploads import Uploads
from .part import PartContext, Row

_OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40, "logprobs": 3},
    {"temperature": 0.9, "top_k": 100, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.4},
    {"temperature": 0.0, "frequency_penalty": 0.7, "presence_penalty": 0.3, "logprobs": 5},
    {"temperature": 1.0, "top_p": 0.99, "logit_bias": {3: 4.0, 7: -50.0}, "min_tokens": 99, "stop_token_ids": (5,)},
)


def check(context: PartContext) -> None:
    """A row: how many tokens of a batch with every option differ."""
    vocab, rows, length = (997, 16, 20) if context.tiny else (128_256, 128, 300)
    with context.guard("sampling"):
        generator = torch.Generator().manual_seed(11)
        logits = torch.randn(rows, vocab, generator=generator) * 4
        known = torch.randint(0, vocab, (rows, length + 1), generator=generator, dtype=torch.int32)
        table = SamplingTable(rows, vocab)
        for row in range(rows):
            table.set(row, SamplingParams(seed=row, max_tokens=99, **_OPTIONS[row % len(_OPTIONS)]), length // 2)
        slots, lengths = np.arange(rows), np.full(rows, length)
        on_host = table.batch(slots, lengths, known.numpy())
        assert on_host is not None, "not all of the rows are greedy"
        expected = sample(logits.clone(), on_host)
        sampler = DeviceSampler(vocab, rows, context.device)
        batch = table.device_batch(slots, lengths)
        on_device = logits.to(context.device)
        samples = sampler.sample(on_device, batch, known.to(context.device), Uploads(context.device))
        samples = samples.map(lambda tensor: tensor.cpu())
        different = sum(mine != theirs for mine, theirs in zip(samples.tokens.tolist(), expected.tokens, strict=True))
        error = _logprob_error(samples.reports() or [], expected.logprobs or [])
        wrong = f"{different} tokens differ, log-probabilities by {error:.1e}" if different or not error < 1e-3 else ""
        text = f"{rows} rows, vocabulary {vocab:,}"
        context.report(Row(what="sampling, every option", value=float(different), text=text, error=wrong))


def _logprob_error(mine: list, theirs: list) -> float:
    """The largest difference; infinite if rows or alternatives differ."""
    worst = 0.0
    for one, other in zip(mine, theirs, strict=True):
        if (one is None) != (other is None) or (one and [t for t, _ in one[1]] != [t for t, _ in other[1]]):
            return float("inf")
        if one is not None:
            values, others = (one[0], *(v for _, v in one[1])), (other[0], *(v for _, v in other[1]))
            worst = max(worst, *(abs(a - b) for a, b in zip(values, others, strict=True)))
    return worst
