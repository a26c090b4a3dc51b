"""Questions and scores of `troupe eval`: the rule of a right answer, task files that cannot be used, absent servers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from raytroupe.cluster.errors import CheckpointError, ConfigError, EngineError
from raytroupe.deploy.cli import cli
from raytroupe.deploy.evaluation.items import DEMO_TASKS, EvalItem, embedded_items, is_json, json_replies, load_items
from raytroupe.deploy.evaluation.score import Score, score
from raytroupe.deploy.evaluation.server import accuracy_table


def item(task: str, answer: str, difficulty: str | None = None) -> EvalItem:
    return EvalItem(task, [{"role": "user", "content": "?"}], answer, difficulty)


def evaluate(*arguments: str) -> None:
    CliRunner().invoke(cli, ["eval", *arguments], catch_exceptions=False)


def test_what_follows_the_last_answer_mark_counts() -> None:
    items = [item("sum", "12")] * 4
    replies = ["7+5=12\nAnswer: 12", " 12 ", "Answer: 11, no.\nAnswer: 12", "The sum is 12"]
    assert score(items, replies)["sum"] == Score(right=3, items=4)
    assert score([item("sum", " 12\n")], ["12"])["sum"] == Score(right=1, items=1)


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
        (
            '{"task": "a", "messages": [], "answer": "b"}\n\n{"messages": [], "task": "a", "answer": "c"}\n',
            r"tasks\.jsonl:3: the same question of task a as in line 1",
        ),
    ],
)
def test_unusable_task_file_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_items(path)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    asked = msgspec.structs.replace(item("a", "b"), messages=[{"role": "user", "content": "one\u2028two\u0085three"}])
    (tmp_path / "tasks.jsonl").write_bytes(msgspec.json.encode(asked) + b"\r\n")
    assert load_items(tmp_path / "tasks.jsonl") == [asked]


def test_missing_task_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.jsonl"):
        load_items(tmp_path / "nowhere.jsonl")


def test_absent_server_is_one_clear_line(unused_tcp_port: int) -> None:
    with pytest.raises(EngineError, match=f"no server answers at http://127.0.0.1:{unused_tcp_port}/v1"):
        evaluate(f"http://127.0.0.1:{unused_tcp_port}/v1")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--against", "base"),
        ("--text", "text.jsonl"),
        ("--report", "report.json"),
        ("--items", "400"),
        ("--window", "512"),
        ("--kv-cache-dtype", "int8"),
        ("--device", "cpu"),
        ("--dtype", "float32"),
        ("--num-threads", "2"),
        ("--max-loss", "1"),
    ],
)
def test_what_a_server_cannot_be_told_is_refused_and_not_ignored(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"http://127\.0\.0\.1:1/v1 is a server, and {flag} can only be said"):
        evaluate("http://127.0.0.1:1/v1", flag, value)


def test_output_that_cannot_be_written_is_found_before_the_server_is_asked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/figures\.json cannot be written"):
        evaluate("http://127.0.0.1:1/v1", "--output", str(tmp_path / "nowhere" / "figures.json"))


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


@pytest.mark.parametrize("text", ['{"a": NaN}', "[Infinity]", "[-Infinity]", "[" * 100_000, '{"a":' * 100_000])
def test_what_only_python_reads_is_no_json(text: str) -> None:
    assert not is_json(text)


def test_json_is_looked_for_where_the_answer_is() -> None:
    items = [item("a", '{"b": 1}'), item("a", "12"), item("a", "[]"), item("a", "[1]")]
    assert json_replies(items, ['So.\nAnswer: {"b": 2}', "{}", "[] it is", "[2]"]) == [True, False, True]
