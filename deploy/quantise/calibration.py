"""The sequences that a quantisation is calibrated with."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...cluster.errors import ConfigError, InvalidRequest
from ...router.tokenizer import Tokenizer
from ..demo_models.tasks import TASKS, training_chat
from ..model_folder import DEMO_MODELS
from .options import QuantiseOptions

Line = dict[str, Any]
"""An object with `text`, or with `messages` of a chat."""


def calibration_sequences(source: Path, options: QuantiseOptions) -> list[list[int]] | None:
    """Token ids of at most `options.samples` sequences of 2 to `options.sequence_length` tokens, chosen by the seed.

    They are the lines of the given file. Without a file the embedded models have chats of their training split
    (`demo_models/tasks.py`), and others None.

    Raises:
        ConfigError: the file cannot be read, or a line is no text or chat; names the line.
        CheckpointError: the model has no tokenizer.
    """
    choose = random.Random(options.seed)
    lines: Iterator[tuple[str, Line]]
    if options.calibration is not None:
        lines = _lines_of(options.calibration, choose)
    elif str(source) in {str(Path(folder).resolve()) for folder in DEMO_MODELS}:
        lines = _training_chats(choose)
    else:
        return None
    return asyncio.run(_tokenise(source, options, lines))


async def _tokenise(source: Path, options: QuantiseOptions, lines: Iterator[tuple[str, Line]]) -> list[list[int]]:
    tokenizer = Tokenizer.load(source)
    sequences: list[list[int]] = []
    for where, line in lines:
        if isinstance(line.get("text"), str):
            tokens = await tokenizer.encode(line["text"], add_special_tokens=True)
        elif tokenizer.chat_template is None:
            raise ConfigError(f"{where}: a chat, but {source} has no chat template; give lines with text")
        else:
            try:
                prompt = tokenizer.chat_template.render(line["messages"], add_generation_prompt=False)
            except InvalidRequest as error:
                raise ConfigError(f"{where}: {error.message}") from None
            tokens = await tokenizer.encode(prompt, add_special_tokens=False)
        if len(tokens) >= 2:
            sequences.append(tokens[: options.sequence_length])
        if len(sequences) == options.samples:
            break
    if not sequences:
        raise ConfigError(f"{options.calibration} has no line of at least two tokens")
    return sequences


def _lines_of(file: Path, choose: random.Random) -> Iterator[tuple[str, Line]]:
    """The lines of a file in random order, each with its place."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # strings may hold what splitlines takes for an end
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {file} cannot be read: {error}") from None
    order = [number for number, line in enumerate(lines) if line.strip()]
    choose.shuffle(order)
    for number in order:
        where = f"{file}:{number + 1}"
        try:
            line = json.loads(lines[number])
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not JSON: {error}") from None
        if not isinstance(line, dict) or not (
            isinstance(line.get("text"), str) or (isinstance(line.get("messages"), list) and line["messages"])
        ):
            raise ConfigError(f"{where}: an object with text, or with a list of messages, is needed")
        yield where, line


def _training_chats(choose: random.Random) -> Iterator[tuple[str, Line]]:
    """Chats that the embedded models were trained on, all tasks alike."""
    weights = dict.fromkeys(TASKS, 1.0)
    while True:
        yield "the embedded tasks", {"messages": training_chat(choose, weights)}
