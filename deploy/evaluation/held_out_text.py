"""Text that a model's loss is measured on: as token ids, with the positions that count.

Of a chat the last message counts if it is the assistant's, given all before it, as a server would be asked; of plain
text every token but the first of a sequence.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ...cluster.errors import ConfigError, InvalidRequest
from ...router.tokenizer import Tokenizer
from ..demo_models.tasks import validation_items

Message = dict[str, str]


class Sample(msgspec.Struct):
    """One piece of text, plain or as a chat, and where it came from."""

    origin: str
    text: str | None = None
    messages: list[Message] | None = None


class ScoredSequence(msgspec.Struct):
    """Token ids, and the first position whose token counts; all behind it count too."""

    tokens: list[int]
    first: int


class _Line(msgspec.Struct):
    text: str | None = None
    messages: list[Message] | None = None


def load_text(path: Path) -> list[Sample]:
    """Read held-out text: JSON lines with `text` or `messages` if the name ends with .jsonl, else one plain text.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line has neither or repeats another; names the line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text {path}: {error}") from None
    if path.suffix != ".jsonl":
        samples = [Sample(str(path), text=content)] if content.strip() else []
    else:
        samples = []
        seen: dict[str, str] = {}
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                sample = _read_line(line, f"{path}:{number}")
                first = seen.setdefault(json.dumps([sample.text, sample.messages]), sample.origin)
                if first != sample.origin:
                    raise ConfigError(f"{sample.origin}: the same text as {first}; remove one, as it says nothing new")
                samples.append(sample)
    if not samples:
        raise ConfigError(f"{path} is empty; write plain text, or JSON lines with text or messages (.jsonl)")
    return samples


def _read_line(line: str, origin: str) -> Sample:
    try:
        read = msgspec.json.decode(line, type=_Line)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{origin}: not a line of held-out text: {error}") from None
    if (read.text is None) == (read.messages is None):
        raise ConfigError(f"{origin}: one of text and messages is needed")
    if read.messages is not None and (len(read.messages) < 2 or read.messages[-1].get("role") != "assistant"):
        raise ConfigError(f"{origin}: the last of several messages must be the assistant's: it is what is scored")
    return Sample(origin, read.text, read.messages)


def embedded_text(seed: int, per_task: int) -> list[Sample]:
    """Held-out chats of the embedded models' tasks, with the replies of a perfect model."""
    return [
        Sample(f"{item.task} {number}", messages=[*item.messages, {"role": "assistant", "content": item.reply}])
        for number, item in enumerate(validation_items(seed, per_task))
    ]


def knows_embedded_tasks(folder: Path) -> bool:
    """Whether a model has the vocabulary of the embedded models, and so is one of them or made of one."""
    vocabulary = _vocabulary(folder)
    return vocabulary is not None and vocabulary == _vocabulary(Path(__file__).parents[1] / "demo_models/demo-small")


def _vocabulary(folder: Path) -> dict[str, int] | None:
    try:
        return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tokenise(samples: Sequence[Sample], tokenizer: Tokenizer, window: int, context: int) -> list[ScoredSequence]:
    """Sequences to score: chats whole, plain text cut into windows.

    Args:
        window: tokens in a sequence of plain text.
        context: the longest sequence that the model takes.

    Raises:
        ConfigError: a chat is longer than the context, or the model's template cannot tell its reply from the prompt;
            there are fewer than two sequences, which leave no interval.
    """
    sequences = asyncio.run(_tokenise(samples, tokenizer, min(window, context), context))
    if len(sequences) < 2:
        raise ConfigError(
            f"the held-out text makes {len(sequences)} sequences of up to {min(window, context)} tokens; give more text"
        )
    return sequences


async def _tokenise(samples: Sequence[Sample], tokenizer: Tokenizer, window: int, context: int) -> list[ScoredSequence]:
    sequences = []
    for sample in samples:
        if sample.messages is not None:
            sequences.append(await _chat(sample.origin, sample.messages, tokenizer, context))
            continue
        tokens = await tokenizer.encode(sample.text or "", add_special_tokens=True)
        starts = range(0, len(tokens), window)
        sequences += [ScoredSequence(tokens[start : start + window], 1) for start in starts if start + 1 < len(tokens)]
    return sequences


async def _chat(origin: str, messages: list[Message], tokenizer: Tokenizer, context: int) -> ScoredSequence:
    template = tokenizer.chat_template
    if template is None:
        raise ConfigError(f"{origin} is a chat, and the model has no chat template; give plain text")
    try:
        prompt = template.render(messages[:-1])
        whole = template.render(messages, add_generation_prompt=False)
    except InvalidRequest as error:
        raise ConfigError(f"{origin}: {error.message}") from None
    if not whole.startswith(prompt):
        raise ConfigError(f"{origin}: the model's chat template changes the prompt once the reply is there; give text")
    before = await tokenizer.encode(prompt, add_special_tokens=False)
    reply = await tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
    if not before or not reply:
        raise ConfigError(f"{origin}: the prompt or the reply is empty")
    if len(before) + len(reply) > context:
        raise ConfigError(f"{origin}: {len(before) + len(reply)} tokens, and the model's context is {context}")
    return ScoredSequence(before + reply, len(before))
