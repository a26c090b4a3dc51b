"""`troupe eval`: how many questions of a task file a running server answers exactly right.

A line of the file is a JSON object with `task`, `messages` (the chat up to the question) and `answer`, and perhaps
`difficulty`. Decoding is greedy. What stands behind the last "Answer:" of a reply counts, or all of it where there is
none (`demo_models/tasks.py`).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import __version__
from ..cluster.errors import ConfigError, EngineError
from .demo_models.tasks import extract_answer

if TYPE_CHECKING:
    from openai import AsyncOpenAI

DEMO_TASKS = Path(__file__).parent / "demo_models" / "validation.jsonl"
Z_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


class EvalItem(msgspec.Struct):
    """One question with its answer."""

    task: str
    messages: list[dict[str, str]]
    answer: str
    difficulty: str | None = None


class Score(msgspec.Struct):
    """Right answers among the items of one task or group of tasks."""

    right: int = 0
    items: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.items

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy (doi:10.1080/01621459.1927.10502953)."""
        n, p, z2 = self.items, self.accuracy, Z_95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)


def eval_command(
    url: Annotated[str, typer.Argument(help="Base address of an OpenAI-compatible API.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        list[str] | None, typer.Option(help="Model to ask; may be repeated. Default: every model of the server.")
    ] = None,
    tasks: Annotated[Path, typer.Option(help="Questions and answers as JSON lines.")] = DEMO_TASKS,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 128,
    output: Annotated[Path | None, typer.Option(help="Write figures and replies here as JSON.")] = None,
) -> None:
    """Measure the exact-match accuracy of a running server."""
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


def load_items(path: Path) -> list[EvalItem]:
    """Read a task file.

    Raises:
        ConfigError: no such file, no items, or a line that is not an item; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the task file {path}: {error}") from None
    items = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                items.append(msgspec.json.decode(line, type=EvalItem))
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}:{number}: not a question with task, messages and answer: {error}") from None
    if not items:
        raise ConfigError(f"{path} has no questions; write one JSON object a line with task, messages and answer")
    return items


def score(items: Sequence[EvalItem], replies: Sequence[str]) -> dict[str, Score]:
    """Scores of every task in order of appearance, then of every difficulty, then of all."""
    tasks: dict[str, Score] = {}
    difficulties: dict[str, Score] = {}
    total = Score()
    for item, reply in zip(items, replies, strict=True):
        groups = [tasks.setdefault(item.task, Score()), total]
        if item.difficulty is not None:
            groups.append(difficulties.setdefault(f"all {item.difficulty}", Score()))
        right = extract_answer(reply) == item.answer
        for group in groups:
            group.items += 1
            group.right += right
    return {**tasks, **difficulties, "all": total}


def figures(s: Score) -> dict[str, Any]:
    """A score as it stands in the JSON file."""
    low, high = s.interval
    return {"right": s.right, "items": s.items, "accuracy": s.accuracy, "low": low, "high": high}


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
