"""Which tokens of held-out text are scored, and which text is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.evaluation.held_out_text import (
    Sample,
    embedded_text,
    knows_embedded_tasks,
    load_text,
    tokenise,
)
from raytroupe.deploy.model_folder import DEMO_MODELS
from raytroupe.router.detokenizer import Detokenizer
from raytroupe.router.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief and correct."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris is the capital of France."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(DEMO_MODELS[0]))


def decode(tokens: list[int], tokenizer: Tokenizer) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    return "".join(map(detokenizer.push, tokens))


def test_reply_is_scored_with_its_end_and_the_prompt_is_not(tokenizer: Tokenizer) -> None:
    first, second = tokenise([Sample("a", messages=CHAT), Sample("b", messages=CHAT)], tokenizer, 512, 2048)
    assert first == second
    assert decode(first.tokens[first.first :], tokenizer) == "Paris is the capital of France.<|end|>"
    assert decode(first.tokens[: first.first], tokenizer).endswith("France?<|end|><|assistant|>")


def test_plain_text_is_cut_into_windows_that_cover_it(tokenizer: Tokenizer) -> None:
    (whole, _) = tokenise([Sample("a", text="one two three four five " * 9)] * 2, tokenizer, 512, 2048)
    windows = tokenise([Sample("a", text="one two three four five " * 9)], tokenizer, 16, 2048)
    assert [token for window in windows for token in window.tokens] == whole.tokens[
        : sum(len(w.tokens) for w in windows)
    ]
    assert sum(len(window.tokens) for window in windows) >= len(whole.tokens) - 1, "one token alone has no loss"
    assert all(window.first == 1 and len(window.tokens) <= 16 for window in windows)


def test_embedded_text_is_reproducible_and_of_every_task() -> None:
    samples = embedded_text(seed=2, per_task=3)
    assert len(samples) == 48
    assert samples == embedded_text(seed=2, per_task=3)
    assert all(sample.messages and sample.messages[-1]["role"] == "assistant" for sample in samples)


def test_embedded_models_are_known_by_their_vocabulary(tmp_path: Path) -> None:
    assert knows_embedded_tasks(Path(DEMO_MODELS[0]))
    assert not knows_embedded_tasks(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    assert not knows_embedded_tasks(tmp_path)


def test_files_of_both_kinds(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("some text\nwith lines\n")
    lines.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"messages": CHAT, "id": 7}) + "\n")
    assert load_text(plain) == [Sample(str(plain), text="some text\nwith lines\n")]
    assert load_text(lines) == [Sample(f"{lines}:1", text="one"), Sample(f"{lines}:3", messages=CHAT)]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n")
    assert [sample.text for sample in load_text(tmp_path / "a.jsonl")] == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", "{}\n", r"a\.jsonl:1: one of text and messages"),
        ("a.jsonl", "nothing\n", r"a\.jsonl:1: not a line of held-out text"),
        ("a.jsonl", json.dumps({"messages": CHAT[:2]}), r"a\.jsonl:1: the last of several messages"),
        ("a.jsonl", '{"text": "a"}\n\n{"text":"a"}', r"a\.jsonl:3: the same text as .*a\.jsonl:1"),
    ],
)
def test_unusable_text_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_text(tmp_path / name)


def test_text_that_does_not_fit_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="the model's context is 10"):
        tokenise([Sample("a", messages=CHAT)], tokenizer, 512, 10)
    with pytest.raises(ConfigError, match="makes 1 sequences of up to 512 tokens; give more text"):
        tokenise([Sample("a", text="short")], tokenizer, 512, 2048)
