"""How the routing benchmarks get to see every token."""

from __future__ import annotations

from typing import Any

EVERY_TOKEN: dict[str, Any] = {"return_token_ids": True}
"""Fields of a request. Answers to random tokens are full of special tokens and halves of characters, which make no text
and so no event; measured by text, the first token would often come with the last one."""
