"""Calibration takes what it was given, the same for the same seed, and never what models are evaluated with."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.demo_models import tasks
from raytroupe.deploy.model_folder import DEMO_MODELS
from raytroupe.deploy.quantise.calibration import calibration_sequences
from raytroupe.deploy.quantise.options import Method, QuantiseOptions
from raytroupe.router.tokenizer import Tokenizer

DEMO = Path(DEMO_MODELS[1]).resolve()


def sequences(file: Path | None, source: Path = DEMO, **others) -> list[list[int]] | None:
    return calibration_sequences(source, QuantiseOptions(Method.GPTQ, calibration=file, **others))


def text_of(tokens: list[int]) -> str:
    return Tokenizer.load(DEMO)._backend.decode(tokens, skip_special_tokens=False)


def write_lines(file: Path, *lines: object) -> Path:
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return file


def test_embedded_models_have_their_training_chats() -> None:
    found = sequences(None, samples=40)
    assert found is not None
    assert len(found) == 40
    assert all(2 <= len(tokens) <= 512 for tokens in found)
    assert found == sequences(None, samples=40)
    assert found != sequences(None, samples=40, seed=1)


def test_no_training_chat_asks_a_question_of_the_evaluation() -> None:
    held_out = {item.identity for item in tasks.validation_items(1, 5)}
    assert all(tasks.split_of(identity) == tasks.VALIDATION for identity in held_out)
    # Facts are asked with few wordings, so that a leak would show soon.
    texts = "\n".join(text_of(tokens) for tokens in sequences(None, samples=200) or ())
    questions = {item.messages[-1]["content"] for item in tasks.validation_items(1, 5) if item.task != "follow_up"}
    assert not [question for question in questions if f"<|user|>{question}<|end|>" in texts]


def test_texts_and_chats_are_read(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Name a planet."}, {"role": "assistant", "content": "Mars."}]
    file = write_lines(tmp_path / "lines.jsonl", {"text": "the red planet " * 9}, {"messages": chat}, {"text": "a"})
    found = sorted(text_of(tokens) for tokens in sequences(file, sequence_length=16) or ())
    assert "<|bos|><|user|>Name a planet.<|end|><|assistant|>Mars.<|end|>" in found
    encoded = asyncio.run(Tokenizer.load(DEMO).encode("the red planet " * 9, add_special_tokens=True))
    assert text_of(encoded[:16]) in found


def test_a_chat_may_have_an_empty_text_beside_it(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Name a planet."}, {"role": "assistant", "content": "Mars."}]
    file = write_lines(tmp_path / "lines.jsonl", {"text": None, "messages": chat})
    (found,) = sequences(file) or ()
    assert text_of(found) == "<|bos|><|user|>Name a planet.<|end|><|assistant|>Mars.<|end|>"


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_only_line_feeds_end_a_line(separator: str, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    text = f"the red{separator}planet"
    written = json.dumps({"text": text}, ensure_ascii=False)
    file.write_text(f"{written}\r\n{written}\n", encoding="utf-8")
    expected = asyncio.run(Tokenizer.load(DEMO).encode(text, add_special_tokens=True))
    assert sequences(file) == [expected] * 2


def test_other_models_have_no_texts_of_their_own(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "mine")
    assert sequences(None, tmp_path / "mine") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a b c d"}\n{"txt": "a"}', r"lines\.jsonl:2: an object with text"),
        ("no json", r"lines\.jsonl:1: not JSON"),
        ("[" * 100_000, r"lines\.jsonl:1: not JSON"),
        ('{"messages": []}', r"lines\.jsonl:1"),
        ('{"messages": [5]}', r"lines\.jsonl:1: the chat template"),
        ("", "no line"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_its_line(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        sequences(file)
