"""`troupe explain`: which model and replica a running server would choose for a prompt, and why."""

from __future__ import annotations

from typing import Annotated, Any

import httpx
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ...cluster.errors import ConfigError, EngineError

SECONDS = 30.0


def explain_command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What a user would say.")],
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model or group.")] = "auto",
    latency_class: Annotated[str | None, typer.Option(help="interactive, default or batch.")] = None,
    ttft_target_ms: Annotated[float | None, typer.Option(help="Target for the first token.")] = None,
    tpot_target_ms: Annotated[float | None, typer.Option(help="Target per further token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="That may be generated.")] = None,
    session: Annotated[str | None, typer.Option(help="Session that the prompt belongs to.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.", envvar="OPENAI_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")] = False,
) -> None:
    """Ask a running server how it would route a prompt. Nothing is generated."""
    headers = {
        "x-latency-class": latency_class,
        "x-ttft-target-ms": None if ttft_target_ms is None else f"{ttft_target_ms:g}",
        "x-tpot-target-ms": None if tpot_target_ms is None else f"{tpot_target_ms:g}",
        "x-session-id": session,
        "authorization": None if api_key is None else f"Bearer {api_key}",
    }
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    answer = ask(url, body, {name: value for name, value in headers.items() if value is not None})
    if as_json:
        typer.echo(answer.text)
        return
    console = Console()
    decision = answer.json()
    target = "the first replica that comes up" if decision["replica"] is None else f"replica {decision['replica']}"
    console.print(
        f"{decision['model']} on {target}: {decision['reason']}", highlight=False, markup=False, soft_wrap=True
    )
    if decision["shadow"] is not None:
        console.print(f"shadow mode: otherwise {decision['shadow']} would answer", highlight=False, markup=False)
    targets = decision["targets"]
    console.print(
        f"{decision['latency_class']}: first token within {targets['ttft_ms']:g} ms, {targets['tpot_ms']:g} ms per "
        f"token; prompt of {decision['prompt_tokens']} tokens",
        highlight=False,
        markup=False,
    )
    console.print(candidate_table(decision))
    excluded = {candidate["model"]: candidate["excluded"] for candidate in decision["candidates"]}
    for name, why in excluded.items():
        if why is not None:
            console.print(f"not {name}: {why}", highlight=False, markup=False, soft_wrap=True)


def ask(url: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
    """The server's answer to `POST /v1/route`.

    Raises:
        ConfigError: the server refuses the request.
        EngineError: it cannot be reached, or fails.
    """
    try:
        answer = httpx.post(
            f"{url.rstrip('/').removesuffix('/v1')}/v1/route", json=body, headers=headers, timeout=SECONDS
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EngineError(f"--url {url}: {error or type(error).__name__}; is `troupe serve` running there?") from None
    if answer.is_success:
        return answer
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    if answer.status_code == 429 and "retry-after" in answer.headers:
        message += f" (Retry-After: {answer.headers['retry-after']} s)"
    kind = EngineError if answer.status_code >= 500 or answer.status_code == 429 else ConfigError
    raise kind(f"HTTP {answer.status_code}: {message}")


def candidate_table(decision: dict[str, Any]) -> Table:
    """A row per candidate, the least cost first. `$/M` is the price of a million such requests."""
    rated = any(candidate["probability"] is not None for candidate in decision["candidates"])
    table = Table(
        box=SIMPLE_HEAD,  # 80 columns are enough for it
        padding=0,
        pad_edge=False,
    )
    table.add_column("")
    table.add_column("model", no_wrap=True)
    table.add_column("replica", no_wrap=True)
    for name in ("cached", "queued", "run", "wait", "TTFT ms", "TPOT", "$/M", *(["p"] if rated else []), "cost"):
        table.add_column(name, justify="right")
    for candidate in decision["candidates"]:
        known = candidate["replica"] is not None
        table.add_row(
            "→" if candidate["chosen"] else "",
            candidate["model"],
            candidate["replica"] or "–",
            *[_shown(candidate[name], "d") if known else "" for name in ("cached_tokens", "queued_tokens")],
            *[_shown(candidate[name], "d") if known else "" for name in ("running", "waiting")],
            *[_shown(candidate[name], ".1f") if known else "" for name in ("ttft_ms", "tpot_ms")],
            _shown(1e6 * candidate["price_dollars"], ".4g") if known else "",
            *([_shown(candidate["probability"], ".2f")] if rated else []),
            _shown(candidate["cost"], ".3f") if known else "",
        )
    return table


def _shown(value: float | None, specification: str) -> str:
    return "" if value is None else format(value, specification)
