"""Questions of the validation set over HTTP: the tokens are those of transformers, and `troupe eval` counts them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from typer.testing import CliRunner

from raytroupe.deploy.check_answers import ask
from raytroupe.deploy.cli import cli
from raytroupe.deploy.evaluation.items import DEMO_TASKS, load_items
from raytroupe.deploy.evaluation.score import score
from raytroupe.deploy.greedy_reference import chat_prompts, greedy_tokens
from raytroupe.deploy.model_folder import DEMO_MODELS

if TYPE_CHECKING:
    from .conftest import Application

LARGE, SMALL = map(Path, DEMO_MODELS)
MAX_TOKENS = 128
EVERY = 11
"""No multiple of the questions per task, so that all tasks are met."""


@pytest.mark.parametrize(
    ("model", "folder", "concurrency"),
    [("large", LARGE, 16), ("small", SMALL, 2), ("large-tp2-pp2", LARGE, 16)],
)
def test_answers_are_those_of_transformers(
    application: Application, model: str, folder: Path, concurrency: int
) -> None:
    items = load_items(DEMO_TASKS)[::EVERY]
    assert len({item.task for item in items}) == 16
    choices = asyncio.run(ask(application.address, model, items, concurrency, MAX_TOKENS))
    expected = greedy_tokens(folder, chat_prompts(folder, [item.messages for item in items]), MAX_TOKENS)
    assert [choice["token_ids"] for choice in choices] == expected


def test_eval_counts_right_answers(application: Application, tmp_path: Path) -> None:
    items = load_items(DEMO_TASKS)[::EVERY]
    tasks, output = tmp_path / "tasks.jsonl", tmp_path / "scores.json"
    tasks.write_bytes(b"\n".join(map(msgspec.json.encode, items)))
    arguments = [
        "eval",
        f"{application.address}/v1",
        "--model",
        "large",
        "--tasks",
        str(tasks),
        "--output",
        str(output),
    ]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(output.read_text())["models"]["large"]
    scores = score(items, written["replies"])
    assert written["scores"]["all"]["right"] == scores["all"].right
    assert scores["all"].accuracy > 0.9
    assert "registry" in result.output
