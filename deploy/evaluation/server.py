"""`troupe eval URL`: how many questions of a task file a running server answers exactly right, greedily."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ... import __version__
from ...cluster.errors import EngineError
from .items import EvalItem, load_items
from .score import Score, figures, score

if TYPE_CHECKING:
    from openai import AsyncOpenAI


def evaluate_server(
    url: str, model: list[str] | None, tasks: Path, concurrency: int, max_tokens: int, output: Path | None
) -> None:
    """Print the exact-match accuracy of every model of a running server; with `output`, write figures and replies.

    Raises:
        ConfigError: from `load_items`. EngineError: from `ask_models`.
    """
    items = load_items(tasks)
    replies = asyncio.run(ask_models(url, model, items, concurrency, max_tokens))
    scores = {name: score(items, of_model) for name, of_model in replies.items()}
    Console().print(accuracy_table(scores))
    if output is not None:
        report = {
            "tasks": tasks.name,
            "max_tokens": max_tokens,
            "models": {
                name: {"scores": {group: figures(s) for group, s in scores[name].items()}, "replies": replies[name]}
                for name in scores
            },
            "troupe": __version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def accuracy_table(scores: dict[str, dict[str, Score]]) -> Table:
    """A row per task, a column per model."""
    table = Table(title="exact match, greedy; in brackets the 95 % interval", title_justify="left")
    table.add_column("task")
    table.add_column("items", justify="right")
    for name in scores:
        table.add_column(name, justify="right", no_wrap=True)
    for group, first in next(iter(scores.values())).items():
        cells = []
        for of_model in scores.values():
            low, high = of_model[group].interval
            cells.append(f"{of_model[group].accuracy:6.1%} [{low:.0%} … {high:.0%}]".replace("[", r"\["))
        table.add_row(group, str(first.items), *cells)
    return table


async def ask_models(
    url: str, models: list[str] | None, items: Sequence[EvalItem], concurrency: int, max_tokens: int
) -> dict[str, list[str]]:
    """The reply of every model to every item.

    Raises:
        EngineError: the server cannot be reached or refuses a request; an accuracy with holes would mislead.
    """
    import openai  # takes a second to import, which the other commands should not pay

    # The key is required by the client; Troupe's API asks for none.
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=8, timeout=600) as client:
        try:
            served = [card.id async for card in client.with_options(max_retries=0).models.list()]
            with Progress(transient=True) as progress:
                return {
                    name: await ask_model(client, name, items, concurrency, max_tokens, progress)
                    for name in models or served
                }
        except openai.APIConnectionError:
            raise EngineError(
                f"no server answers at {url}; start one with `troupe serve` or name its address"
            ) from None
        except openai.APIError as error:
            raise EngineError(f"the server at {url} refused a question: {error.message}") from None


async def ask_model(
    client: AsyncOpenAI, model: str, items: Sequence[EvalItem], concurrency: int, max_tokens: int, progress: Progress
) -> list[str]:
    """The greedy reply of one model to every item, in order, with `concurrency` requests under way."""
    bar = progress.add_task(model, total=len(items))
    free = asyncio.Semaphore(concurrency)

    async def ask(item: EvalItem) -> str:
        async with free:
            answer = await client.chat.completions.create(
                model=model,
                messages=item.messages,  # type: ignore[arg-type]  # plain dicts of role and content
                temperature=0,
                max_tokens=max_tokens,
            )
        progress.advance(bar)
        return answer.choices[0].message.content or ""

    return await asyncio.gather(*(ask(item) for item in items))
