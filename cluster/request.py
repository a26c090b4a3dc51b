"""What one request asks of the engine, and what comes back: the structs that cross from ingress to scheduler."""

from __future__ import annotations

import enum

import msgspec

from .latency_class import LatencyTargets


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn. Ranges are checked by the ingress (`router/protocol.py`).

    The random number of a draw is a function of (`seed`, position of the token) only, so `seed` is always set:
    the ingress draws one where the client gives none.
    """

    temperature: float = 1.0
    """0 means greedy: the largest logit, the lower token id on a tie."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output (CTRL, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """Unsigned 64 bits."""
    logprobs: int | None = None
    """Number of alternatives reported per token; 0: only the chosen token's; None: none."""
    max_tokens: int = 16
    min_tokens: int = 0
    """Stop tokens are masked until so many tokens have been generated."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends the generation; includes the model's end-of-sequence tokens unless the request ignores them."""

    @property
    def greedy(self) -> bool:
        """True if no random number is needed."""
        return self.temperature == 0.0


class EngineRequest(msgspec.Struct, kw_only=True):
    """A tokenised request, ready to be scheduled.

    `generated` are output tokens that are already known, from another replica that died: they are computed like a
    prompt and count as output, so that the stream goes on where it stopped.
    """

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    generated: list[int] = []
    priority: int = 0
    """Lower is more urgent."""
    cache_salt: str = ""
    """Requests share cached prefixes only within the same salt."""
    latency: LatencyTargets = LatencyTargets()
    """Its latency class and targets, which decide its place in the queue."""


class FinishReason(enum.StrEnum):
    """Why a request ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position: natural logarithm, of the distribution before temperature and filters."""

    chosen: float
    top: list[tuple[int, float]]
    """(token id, log-probability), most likely first."""


class TokenOutput(msgspec.Struct, array_like=True):
    """What one engine step did for one request."""

    request_id: str
    tokens: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop token that ended the request; it is the last of `tokens`."""
    logprobs: list[TokenLogprobs] | None = None
    """One per token if asked for."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache; set in the first output."""
    index: int = 0
    """Of the first of `tokens` among the request's generated tokens, `EngineRequest.generated` included: from it the
    reader sees whether an output came twice or one was lost on the way."""

    def absorb(self, later: TokenOutput) -> None:
        """Also say what `later`, the next output of the same request, says."""
        self.tokens.extend(later.tokens)
        if later.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs.extend(later.logprobs)
        self.finish_reason = later.finish_reason
        self.stop_token = later.stop_token
        self.cached_tokens = self.cached_tokens or later.cached_tokens

    def drop_first(self, count: int) -> None:
        """Leave the first `count` tokens out, or all if there are fewer."""
        self.index += min(count, len(self.tokens))
        del self.tokens[:count]
        if self.logprobs is not None:
            del self.logprobs[:count]
