"""Ray's own cache-aware router, as a user of Ray gets it, told how to read our calls.

The public name, `ray.serve.llm.request_router.PrefixCacheAffinityRouter`, cannot be imported without vLLM or SGLang,
because its package imports Ray's LLM server; the module that holds the code can. Serve pickles this module by value,
so it holds the router classes and nothing else.
"""

from __future__ import annotations

from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter
from ray.serve.request_router import PendingRequest

from .prompt_text import prompt_text


class PrefixAffinity(PrefixCacheAffinityRouter):
    """With its defaults in code: however uneven the load is, a prefix stays where it is."""

    def _extract_text_from_request(self, pending_request: PendingRequest) -> str:
        """The original looks for the attributes of an OpenAI request; our calls are encoded ones with token ids."""
        return prompt_text(pending_request.args[0])


class BalancedPrefixAffinity(PrefixAffinity):
    """As Ray's guide shows it (doc/source/serve/llm/user-guides/prefix-aware-routing.md): where the queues differ by
    more than 10 requests, load decides."""

    def initialize_state(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Serve calls this once."""
        super().initialize_state(**{"imbalanced_threshold": 10, **kwargs})
