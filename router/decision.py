"""What a routing decision is made of. Structs, because one of each is made for every request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from .cost import Costs


class Prompt(msgspec.Struct, frozen=True):
    """A prompt as one model sees it."""

    tokens: int
    overlaps: Mapping[str, int]
    """Replica → leading blocks of the prompt that its cache holds; those with none may be left out."""
    hashes: Sequence[int] = ()
    """Short hashes of the prompt's full blocks."""
    copies_wanted: float = 1.0
    """Requests under way that share what is cached of it, per replica that has it; at least 1."""


class Choice(msgspec.Struct, frozen=True):
    """The models that may answer, and how that was found."""

    models: tuple[str, ...]
    reason: str
    probabilities: Mapping[str, float] = {}
    """By model, where a classifier was asked: that it answers as well as the best one."""
    excluded: Mapping[str, str] = {}
    """Model → why it may not answer."""
    draft: str | None = None
    """The one of `models` whose first tokens are checked before the client sees them."""


class Candidates(msgspec.Struct, frozen=True):
    """Replicas that could take a request, and what it would cost there; one entry per replica."""

    rows: Any
    """Their rows in the fleet, int array."""
    lengths: Any
    """Tokens of the prompt, float array."""
    cached: Any
    """Of these, expected in the replica's cache, float array."""
    costs: Costs


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided for one request, with everything that it was decided by."""

    model: str
    replica: str | None = None
    """None: no replica of the model is known; Serve finds one when it comes up."""
    reason: str
    choice: Choice
    prompt: Prompt
    """As the model sees it."""
    cached_tokens: int = 0
    """Of the prompt, expected in the replica's cache."""
    ttft: float = math.nan
    tpot: float = math.nan
    """Predicted seconds."""
    price: float = math.nan
    """Dollars, as expected."""
    candidates: Candidates | None = None
    """All that were compared; None without a replica."""
    shadow: str | None = None
    """In shadow mode: the model that would have answered."""

    @property
    def checked(self) -> bool:
        """The model only drafts, and a better one answers if the draft looks unsure."""
        return self.model == self.choice.draft

    @property
    def uncached_tokens(self) -> int:
        """Of the prompt, to be computed."""
        return self.prompt.tokens - self.cached_tokens
