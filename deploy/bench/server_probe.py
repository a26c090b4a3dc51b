"""What a server offers, asked before anything is measured: its models, and which request fields it accepts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, urlunsplit

import httpx
import msgspec

from ...cluster.errors import ConfigError, EngineError
from .client import ServerOptions, error_text, request_body
from .workload import Prompt, Request

VOCAB_SIZES = (30_000, 16_000, 8_000, 4_000, 1_000, 256)
"""Sizes that are tried in turn where the server's vocabulary is not known."""
ANSWER_SECONDS = 120.0


class Probe:
    """Asks a server small things, one after the other."""

    def __init__(self, url: SplitResult, headers: dict[str, str]) -> None:
        self._base = urlunsplit(url)
        self._client = httpx.Client(headers=headers, timeout=ANSWER_SECONDS, trust_env=False)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def models(self) -> list[str]:
        """The models that the server lists.

        Raises:
            EngineError: it cannot be reached, or has no such list.
        """
        answer = self._send("GET", f"{self._base}/models")
        try:
            names = [str(card["id"]) for card in answer.json()["data"]] if answer.status_code == 200 else []
        except (ValueError, KeyError, TypeError):
            names = []
        if not names:
            raise EngineError(
                f"{self._base}/models lists no models ({answer.status_code}: {error_text(answer.content)}); "
                "name the model with --model, and check that the address is that of an OpenAI-compatible API"
            )
        return names

    def accepted(
        self, options: ServerOptions, prompt_of: Callable[[int], Prompt], vocab_size: int | None
    ) -> tuple[ServerOptions, int]:
        """The options that the server accepts, and a vocabulary size that it has.

        Fields beyond OpenAI's are left out one after the other until a small request is answered.

        Args:
            prompt_of: vocabulary size to a short prompt that has its last token.
            vocab_size: None: find one of `VOCAB_SIZES`.

        Raises:
            EngineError: the server accepts none of them; with what it said to the first.
        """
        sizes = (vocab_size,) if vocab_size is not None else VOCAB_SIZES if not options.chat else VOCAB_SIZES[:1]
        first_refusal = ""
        for include_usage, ignore_eos in itertools.product(_kept(options.include_usage), _kept(options.ignore_eos)):
            tried = msgspec.structs.replace(options, ignore_eos=ignore_eos, include_usage=include_usage)
            for size in sizes:
                request = Request(prompt_of(size), 1, 2)
                answer = self._send("POST", self._endpoint(options), json=request_body(tried, request))
                if answer.status_code == 200:
                    return tried, size
                first_refusal = first_refusal or f"{answer.status_code}: {error_text(answer.content)}"
                if answer.status_code not in (400, 422):  # not about a field
                    raise EngineError(f"{self._endpoint(options)} answers {first_refusal}")
        raise EngineError(f"{self._endpoint(options)} refuses a small request, {first_refusal}")

    def _endpoint(self, options: ServerOptions) -> str:
        return f"{self._base}/{'chat/completions' if options.chat else 'completions'}"

    def _send(self, method: str, url: str, **arguments: Any) -> httpx.Response:
        try:
            return self._client.request(method, url, **arguments)
        except httpx.TransportError as error:
            raise EngineError(
                f"no server answers at {self._base} ({error or type(error).__name__}); start one, or name its address"
            ) from None


def _kept(wanted: bool) -> tuple[bool, ...]:
    """With a field first, if it is wanted, then without."""
    return (True, False) if wanted else (False,)


def choose_model(names: list[str], url: str) -> str:
    """The only model of a server.

    Raises:
        ConfigError: there are several.
    """
    if len(names) > 1:
        raise ConfigError(f"{url} serves {', '.join(names)}; choose one with --model")
    return names[0]
