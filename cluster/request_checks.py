"""What no request may ask of an engine, whoever sends it. The ingress refuses more, in the words of its API."""

from __future__ import annotations

from .errors import InvalidRequest
from .request import EngineRequest


def check_request(request: EngineRequest, max_model_len: int) -> None:
    """
    Raises:
        InvalidRequest: no prompt, one that fills the context or has an id that is no token's, or nothing left to
            generate.
    """
    length = len(request.prompt) + len(request.generated)
    if not request.prompt:
        raise InvalidRequest("the prompt has no tokens; send at least one", param="prompt")
    for token in (min(request.prompt), max(request.prompt)):
        if not 0 <= token < 2**31:
            raise InvalidRequest(f"the prompt has the token id {token}; ids lie in [0, 2^31)", param="prompt")
    if length >= max_model_len:
        raise InvalidRequest(
            f"the prompt has {length} tokens, which leaves no room in the context of {max_model_len}; shorten it to at "
            f"most {max_model_len - 1} tokens",
            param="prompt",
        )
    if len(request.generated) >= request.sampling.max_tokens:
        raise InvalidRequest(
            f"{len(request.generated)} tokens are generated already and max_tokens is "
            f"{request.sampling.max_tokens}; raise max_tokens",
            param="max_tokens",
        )
