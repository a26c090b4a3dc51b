"""Log-probabilities in the formats of the two endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .generation import TokenChance
from .tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say (vLLM's and OpenAI's convention)."""


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """`token` as text; OpenAI's notation `bytes:\\xf0\\x9f` for a part of a character."""
    data = tokenizer.token_bytes.inner(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(chances: Sequence[TokenChance], top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `logprobs` object of a chat choice: every token with its bytes and up to `top` alternatives."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes.inner(token)
        return {"token": token_text(token, tokenizer), "logprob": max(logprob, LOWEST), "bytes": list(data)}

    content = [
        {
            **entry(chance.token, chance.logprobs.chosen),
            "top_logprobs": [entry(token, logprob) for token, logprob in chance.logprobs.top[:top]],
        }
        for chance in chances
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(chances: Sequence[TokenChance], top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `logprobs` object of a completion choice: parallel lists over its tokens.

    The chosen token is always among the alternatives, so there may be `top` + 1 of them.
    """
    alternatives = []
    for chance in chances:
        found = {token_text(token, tokenizer): max(logprob, LOWEST) for token, logprob in chance.logprobs.top[:top]}
        found.setdefault(token_text(chance.token, tokenizer), max(chance.logprobs.chosen, LOWEST))
        alternatives.append(found)
    return {
        "text_offset": [chance.text_offset for chance in chances],
        "token_logprobs": [max(chance.logprobs.chosen, LOWEST) for chance in chances],
        "tokens": [token_text(chance.token, tokenizer) for chance in chances],
        "top_logprobs": alternatives,
    }
