"""Whether a served model answers the validation set as transformers does: greedy, in float32, token by token.

    python -m raytroupe.deploy.check_answers
    python -m raytroupe.deploy.check_answers -- -tp 2 -pp 2

One server of both embedded models is started with `--dtype float32` and the given arguments, up to 64 questions are
under way at once, and the token ids of every reply are compared with those of transformers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from transformers.utils.logging import disable_progress_bar

from ..cluster.errors import EngineError
from .bench.options import JsonFile
from .bench.report import Column, Report, publish, run_as_program
from .bench.serve_process import ServeProcess
from .evaluation.items import DEMO_TASKS, EvalItem, load_items
from .evaluation.score import score
from .greedy_reference import chat_prompts, greedy_tokens
from .model_folder import DEMO_MODELS

COLUMNS = [
    Column("model", "model"),
    Column("questions", "questions", "d"),
    Column("right", "right answers", ".1%"),
    Column("equal", "same tokens as transformers", "d"),
    Column("ratio", "share", ".1%"),
]


def main(
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of troupe serve, after `--`.")] = None,
    tasks: Annotated[Path, typer.Option(help="Questions and answers as JSON lines.")] = DEMO_TASKS,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 128,
    json_file: JsonFile = None,
) -> None:
    """Compare the answers of the embedded models over HTTP with those of transformers."""
    disable_progress_bar()
    items = load_items(tasks)
    rows: list[dict[str, Any]] = []
    differing: dict[str, list[str]] = {}
    folders = [Path(model) for model in DEMO_MODELS]
    with ServeProcess("--dtype", "float32", *(arguments or [])) as server:
        answers = [asyncio.run(ask(server.address, folder.name, items, concurrency, max_tokens)) for folder in folders]
    for folder, choices in zip(folders, answers, strict=True):
        expected = greedy_tokens(folder, chat_prompts(folder, [item.messages for item in items]), max_tokens)
        pairs = list(zip(items, choices, expected, strict=True))
        differing[folder.name] = [
            item.messages[-1]["content"] for item, choice, tokens in pairs if choice["token_ids"] != tokens
        ]
        equal = len(items) - len(differing[folder.name])
        right = score(items, [choice["message"]["content"] for choice in choices])["all"]
        rows.append(
            {
                "model": folder.name,
                "questions": len(items),
                "right": right.accuracy,
                "equal": equal,
                "ratio": equal / len(items),
            }
        )
    settings = {"arguments": " ".join(arguments or []), "dtype": "float32", "max_tokens": max_tokens}
    publish(Report("check_answers", settings, COLUMNS, rows, {"differing": differing}), json_file)
    if any(differing.values()):
        raise typer.Exit(1)


async def ask(
    address: str, model: str, items: Sequence[EvalItem], concurrency: int, max_tokens: int
) -> list[dict[str, Any]]:
    """The first choice of the answer to every item, with its token ids, in order."""
    free = asyncio.Semaphore(concurrency)

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def complete(item: EvalItem) -> dict[str, Any]:
            body = {
                "model": model,
                "messages": item.messages,
                "temperature": 0,
                "max_tokens": max_tokens,
                "return_token_ids": True,
            }
            async with free:
                answer = await client.post(f"{address}/v1/chat/completions", json=body)
            if answer.status_code != 200:
                raise EngineError(f"{answer.status_code} for {item.messages[-1]['content']!r}: {answer.text}")
            return answer.json()["choices"][0]

        return await asyncio.gather(*(complete(item) for item in items))


if __name__ == "__main__":
    run_as_program(main)
