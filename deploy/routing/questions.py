"""The questions that a router is fitted on: task files as `troupe eval` reads them, or the embedded models' own."""

from __future__ import annotations

import json
import random

import msgspec

from ...router.prompt_features import PromptFacts
from ..demo_models.tasks import TASKS, TRAIN, as_record, draw, system_messages
from ..evaluation.items import EvalItem


def training_items(seed: int, per_task: int) -> list[EvalItem]:
    """Distinct questions of the training split of the embedded models' tasks; of a task with fewer than `per_task`
    about all that there are."""
    items = []
    for name, task in TASKS.items():
        rng = random.Random(f"{seed}/training/{name}")
        seen: set[str] = set()
        for _ in range(20 * per_task):
            item = draw(task, rng, TRAIN)
            if item.identity not in seen:
                seen.add(item.identity)
                found = msgspec.convert(as_record(item), EvalItem)
                found.messages = [*system_messages(rng), *found.messages]
                items.append(found)
            if len(seen) == per_task:
                break
    return items


def identity(item: EvalItem) -> str:
    """What is the same question: all but the system prompt."""
    return json.dumps([message for message in item.messages if message.get("role") != "system"])


def facts_of(item: EvalItem, prompt_tokens: int) -> PromptFacts:
    """What serving would know of a question (`router/preparation.py`)."""
    asked = [message["content"] for message in item.messages if message.get("role") == "user"]
    return PromptFacts(
        text=asked[-1] if asked else "",
        chars=sum(len(message["content"]) for message in item.messages),
        messages=len(item.messages),
        prompt_tokens=prompt_tokens,
    )
