"""From the sampler's figures to what a step reports."""

from __future__ import annotations

from ..cluster.request import TokenLogprobs


def token_logprobs(
    reports: list[tuple[float, list[tuple[int, float]]] | None] | None,
) -> list[TokenLogprobs | None] | None:
    """`SampledTokens.logprobs` as messages."""
    if reports is None:
        return None
    return [None if entry is None else TokenLogprobs(*entry) for entry in reports]
