"""What every model answers to every question, and what that took: kept in a file, so that only new ones are asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...cluster.checkpoint_hash import hash_checkpoint
from ...cluster.errors import ConfigError
from ...cluster.model_spec import ModelSpec, load_spec
from ...router.tokenizer import Tokenizer
from ..evaluation.items import EvalItem
from ..evaluation.loaded_model import LoadedModel, chat_prompts
from ..model_folder import find_model_folder

CHUNK = 1024
"""Questions that are asked together. What is answered is written to the file after each, so that an interrupted run
goes on where it was."""


class Answer(msgspec.Struct, frozen=True):
    """One model's reply to one question; a line of the file."""

    model: str
    """Hash of the model's content and of what else its replies depend on."""
    question: str
    """Hash of the messages."""
    reply: str
    prompt_tokens: int
    output_tokens: int


class AnswerFile:
    """All answers that are known, by model and question."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ConfigError: the file cannot be read, or has a line that is no answer.
        """
        self.path = path
        self._known: dict[tuple[str, str], Answer] = {}
        if not path.exists():
            return
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise ConfigError(f"--labels {path} cannot be read: {error.strerror}") from None
        for number, line in enumerate(lines, start=1):
            if line:
                try:
                    self._remember(msgspec.json.decode(line, type=Answer))
                except msgspec.DecodeError as error:
                    raise ConfigError(
                        f"{path}:{number}: not an answer that troupe router fit has written ({error}); name another "
                        "file with --labels, or delete this one"
                    ) from None

    def find(self, model: str, question: str) -> Answer | None:
        """The answer, if it is known."""
        return self._known.get((model, question))

    def add(self, answers: Sequence[Answer]) -> None:
        """Remember answers and write them to the end of the file. Raises ConfigError if that is not possible."""
        try:
            with self.path.open("ab") as file:
                file.writelines(msgspec.json.encode(answer) + b"\n" for answer in answers)
        except OSError as error:
            raise ConfigError(f"--labels {self.path} cannot be written: {error.strerror}") from None
        for answer in answers:
            self._remember(answer)

    def _remember(self, answer: Answer) -> None:
        self._known[answer.model, answer.question] = answer


class Variant:
    """One of the models to choose among, and the questions as its tokens."""

    def __init__(self, model: str, *, max_tokens: int, concurrency: int, engine: dict[str, Any]) -> None:
        """
        Args:
            model: as `troupe serve` takes it, or `name=model` if it is served under another name than the folder's.
            engine: fields of `ModelConfig`.

        Raises:
            CheckpointError: the folder cannot be found, or lacks a config, weights or a tokenizer.
        """
        given, _, place = model.rpartition("=")
        self.folder = find_model_folder(place)
        self.name = given or Path(place.rstrip("/")).name
        self.spec: ModelSpec = load_spec(self.folder)
        self.tokenizer = Tokenizer.load(self.folder)
        self.max_tokens, self.concurrency, self._engine = max_tokens, concurrency, engine
        depends = json.dumps([hash_checkpoint(self.folder).sha256, max_tokens, engine.get("dtype", "auto")])
        self.key = hashlib.sha256(depends.encode()).hexdigest()[:16]

    def answers(
        self, items: Sequence[EvalItem], file: AnswerFile, advance: Callable[[int], None] = lambda done: None
    ) -> list[Answer]:
        """The model's greedy answers to all items, asking those that `file` does not have.

        Args:
            advance: called with the number of questions that are answered.

        Raises:
            ConfigError: a question is longer than the model's context, or cannot be asked.
        """
        keys = [question_key(item) for item in items]
        missing = [place for place, key in enumerate(keys) if file.find(self.key, key) is None]
        if missing:
            self._ask([(keys[place], items[place]) for place in missing], file, len(items) - len(missing), advance)
        found = [file.find(self.key, key) for key in keys]
        return [answer for answer in found if answer is not None]

    def _ask(
        self, items: Sequence[tuple[str, EvalItem]], file: AnswerFile, done: int, advance: Callable[[int], None]
    ) -> None:
        prompts = chat_prompts([item for _, item in items], self.tokenizer)
        longest = max(map(len, prompts)) + self.max_tokens
        if longest > self.spec.max_position_embeddings:
            raise ConfigError(
                f"the longest question and --max-tokens {self.max_tokens} make {longest} tokens, and the context of "
                f"{self.name} is {self.spec.max_position_embeddings}; ask for fewer"
            )
        with LoadedModel(
            self.folder, longest=longest, concurrency=self.concurrency, waiting=CHUNK, **self._engine
        ) as loaded:
            for begin in range(0, len(items), CHUNK):
                chunk = range(begin, min(begin + CHUNK, len(items)))
                replies = loaded.replies(
                    prompts[chunk.start : chunk.stop],
                    self.tokenizer,
                    self.max_tokens,
                    lambda count, begin=begin: advance(done + begin + count),  # type: ignore[misc]
                )
                file.add(
                    [
                        Answer(self.key, items[place][0], text, len(prompts[place]), tokens)
                        for place, text, tokens in zip(chunk, replies.texts, replies.tokens, strict=True)
                    ]
                )


def question_key(item: EvalItem) -> str:
    """Names a question in the file of answers."""
    return hashlib.sha256(json.dumps(item.messages).encode()).hexdigest()[:16]


def check_names(variants: Sequence[Variant]) -> None:
    """Refuse models that cannot be told apart, as in a configuration. Raises ConfigError."""
    names = [variant.name for variant in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two models are called {twice[0]!r}; the names must be those that they are served under")
