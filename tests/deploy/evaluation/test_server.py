"""Questions and scores of `troupe eval`: the rule of a right answer, task files that cannot be used, absent servers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from raytroupe.cluster.errors import ConfigError, EngineError
from raytroupe.deploy.evaluation.command import eval_command
from raytroupe.deploy.evaluation.items import DEMO_TASKS, EvalItem, embedded_items, is_json, load_items
from raytroupe.deploy.evaluation.score import Score, score
from raytroupe.deploy.evaluation.server import accuracy_table


def item(task: str, answer: str, difficulty: str | None = None) -> EvalItem:
    return EvalItem(task, [{"role": "user", "content": "?"}], answer, difficulty)


def test_what_follows_the_last_answer_mark_counts() -> None:
    items = [item("sum", "12")] * 4
    replies = ["7+5=12\nAnswer: 12", " 12 ", "Answer: 11, no.\nAnswer: 12", "The sum is 12"]
    assert score(items, replies)["sum"] == Score(right=3, items=4)


def test_groups_are_tasks_then_difficulties_then_all() -> None:
    items = [item("b", "x", "easy"), item("a", "x", "hard"), item("b", "x", "easy"), item("c", "x")]
    scores = score(items, ["x", "x", "y", "y"])
    assert list(scores) == ["b", "a", "c", "all easy", "all hard", "all"]
    assert scores["b"] == Score(1, 2)
    assert scores["all easy"] == Score(1, 2)
    assert scores["all hard"] == Score(1, 1)
    assert scores["all"] == Score(2, 4)


def test_table_shows_every_model_beside_the_others() -> None:
    items = [item("sum", "1"), item("sum", "2")]
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(accuracy_table({"large": score(items, ["1", "2"]), "small": score(items, ["1", "3"])}))
    text = console.export_text()
    assert "large" in text
    assert "100.0%" in text
    assert "50.0% [9% … 91%]" in text


def test_embedded_tasks_are_complete() -> None:
    scores = score(items := load_items(DEMO_TASKS), [item.answer for item in items])
    assert scores["all"] == Score(608, 608)
    assert len([name for name in scores if not name.startswith("all")]) == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no questions"),
        ('{"task": "a", "messages": []}\n', r"tasks\.jsonl:1: .*answer"),
        (json.dumps({"task": "a", "messages": [], "answer": "b"}) + "\nnot json\n", r"tasks\.jsonl:2: "),
    ],
)
def test_unusable_task_file_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_items(path)


def test_missing_task_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.jsonl"):
        load_items(tmp_path / "nowhere.jsonl")


def test_absent_server_is_one_clear_line(unused_tcp_port: int) -> None:
    with pytest.raises(EngineError, match=f"no server answers at http://127.0.0.1:{unused_tcp_port}/v1"):
        eval_command(f"http://127.0.0.1:{unused_tcp_port}/v1")


def test_server_is_not_compared() -> None:
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:1/v1 is a server"):
        eval_command("http://127.0.0.1:1/v1", against="base")


def test_embedded_questions_are_distinct_and_as_many_as_there_are() -> None:
    items = embedded_items(seed=2, per_task=12)
    assert len(items) == 16 * 12
    assert items == embedded_items(seed=2, per_task=12)
    asked = {json.dumps(item.messages) for item in items}
    assert len(asked) == len(items)


@pytest.mark.parametrize(
    ("text", "valid"), [('{"a": 1}', True), (" [] ", True), ("12", False), ('{"a": 1', False), ('{"a": 1} so', False)]
)
def test_json_is_an_object_or_array_alone(text: str, valid: bool) -> None:
    assert is_json(text) is valid
