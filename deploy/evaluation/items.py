"""Questions with exact answers: task files, and as many as wanted of the embedded models' tasks.

A line of a task file is a JSON object with `task`, `messages` (the chat up to the question) and `answer`, and perhaps
`difficulty`. What stands behind the last "Answer:" of a reply counts, or all of it where there is none
(`demo_models/tasks.py`), without the space around it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ...cluster.errors import ConfigError
from ..demo_models.tasks import as_record, extract_answer, validation_items

DEMO_TASKS = Path(__file__).parent.parent / "demo_models" / "validation.jsonl"


class EvalItem(msgspec.Struct):
    """One question with its answer."""

    task: str
    messages: list[dict[str, str]]
    answer: str
    difficulty: str | None = None


def load_items(path: Path) -> list[EvalItem]:
    """Read a task file.

    Raises:
        ConfigError: no such file, no items, a line that is not an item, or a question that was asked before, which
            would count as two samples; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the task file {path}: {error}") from None
    items = []
    asked: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = msgspec.json.decode(line, type=EvalItem)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}:{number}: not a question with task, messages and answer: {error}") from None
        first = asked.setdefault(json.dumps([item.task, item.messages]), number)
        if first != number:
            raise ConfigError(f"{path}:{number}: the same question of task {item.task} as in line {first}; remove one")
        items.append(item)
    if not items:
        raise ConfigError(f"{path} has no questions; write one JSON object a line with task, messages and answer")
    return items


def embedded_items(seed: int, per_task: int) -> list[EvalItem]:
    """Held-out questions of the embedded models' tasks; of a task with fewer than `per_task` all that there are."""
    return [msgspec.convert(as_record(item), EvalItem) for item in validation_items(seed, per_task)]


def right(items: Sequence[EvalItem], replies: Sequence[str]) -> list[bool]:
    """Which replies are exactly right."""
    return [extract_answer(reply) == item.answer.strip() for item, reply in zip(items, replies, strict=True)]


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or array and nothing else, by RFC 8259: Python's NaN and Infinity are no JSON."""
    try:
        return isinstance(json.loads(text, parse_constant=_refuse), dict | list)
    except (ValueError, RecursionError):  # the latter for thousands of brackets, which no reply should be
        return False


def json_replies(items: Sequence[EvalItem], replies: Sequence[str]) -> list[bool]:
    """For every item whose answer is JSON, whether what counts of the reply is."""
    pairs = zip(items, replies, strict=True)
    return [is_json(extract_answer(reply)) for item, reply in pairs if is_json(item.answer)]


def _refuse(constant: str) -> None:
    raise ValueError(constant)
