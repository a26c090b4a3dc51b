"""`troupe eval MODEL --against BASE`: both models loaded, asked the same questions and shown the same text."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from ...cluster.checkpoint_hash import CheckpointHash, hash_checkpoint
from ...cluster.errors import ConfigError
from ...cluster.evaluation_report import Evaluation, Limits, ModelFigures
from ...cluster.model_spec import ModelSpec, load_spec
from ...router.tokenizer import Tokenizer
from ..bench.report import environment, measure_in_turn
from ..model_folder import find_model_folder
from .held_out_text import Sample, ScoredSequence, embedded_text, knows_embedded_tasks, load_text, tokenise
from .items import EvalItem, embedded_items, is_json, load_items, right
from .loaded_model import LoadedModel, chat_prompts
from .score import Score, figures, score
from .text_losses import TextLosses, compare_losses
from .verdict import judge_task, judge_text, overall

SEED = 2
"""Of the embedded models' questions and text: another than that of `demo_models/validation.jsonl`, which versions of
the models were chosen with."""
TEXT_PER_TASK = 100
"""Chats of each of the embedded models' tasks whose replies are scored."""
SPEED_PROMPT = 16
"""Tokens of the prompt whose answer's speed is measured."""
SPEED_RUNS = 3
"""A speed is the median of so many runs; the models take turns, so that a drift of the machine meets both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked, and how."""

    tasks: Path | None
    """None: the embedded models' own."""
    text: Path | None
    """Likewise."""
    items: int
    """Questions of each of the embedded models' tasks."""
    window: int
    max_tokens: int
    concurrency: int
    limits: Limits
    engine: dict[str, Any]
    """Fields of `ModelConfig` for both models."""
    kv_cache_dtype: str
    """Of the variant."""


class Candidate:
    """One of the models before it is loaded: its folder, its tokenizer, and the questions and text as its tokens."""

    def __init__(self, model: str, items: Sequence[EvalItem], samples: Sequence[Sample], settings: Settings) -> None:
        self.folder = find_model_folder(model)
        self.spec: ModelSpec = load_spec(self.folder)
        self.tokenizer = Tokenizer.load(self.folder)
        self.prompts = chat_prompts(items, self.tokenizer)
        context = self.spec.max_position_embeddings
        self.sequences: list[ScoredSequence] = tokenise(samples, self.tokenizer, settings.window, context)
        asked = max(map(len, self.prompts)) + settings.max_tokens
        if asked > context:
            raise ConfigError(
                f"the longest question and --max-tokens {settings.max_tokens} make {asked} tokens, and the context of "
                f"{self.folder.name} is {context}; ask for fewer"
            )
        self.longest = max(asked, *(len(sequence.tokens) for sequence in self.sequences))


def compare(model: str, base: str, settings: Settings, console: Console) -> tuple[Path, Evaluation]:
    """Measure both models and judge the first; also gives its folder.

    Raises:
        ConfigError: questions, text or models do not go together. CheckpointError: a model cannot be loaded.
    """
    items, samples, sources = questions_and_text(model, settings)
    variant_side, base_side = (Candidate(name, items, samples, settings) for name in (model, base))
    if variant_side.sequences != base_side.sequences:
        raise ConfigError(f"{model} and {base} make different tokens of the same text, so they cannot be compared")
    with console.status("hashing the checkpoints"):
        hashes = [hash_checkpoint(side.folder) for side in (variant_side, base_side)]
    longest = max(variant_side.longest, base_side.longest)
    with ExitStack() as stack:
        with console.status(f"loading {base_side.folder.name} and {variant_side.folder.name}"):
            loaded_base = stack.enter_context(_load(base_side, settings, longest, "auto"))
            loaded_variant = stack.enter_context(_load(variant_side, settings, longest, settings.kv_cache_dtype))
        losses = _losses(loaded_base, loaded_variant, base_side.sequences, console)
        replies = [
            _ask(loaded, side, settings, console)
            for loaded, side in ((loaded_base, base_side), (loaded_variant, variant_side))
        ]
        speeds = _speeds([loaded_base, loaded_variant], base_side.prompts[0], settings, console)
    of_base = _figures(base_side, hashes[1], loaded_base, items, replies[0], speeds[0], "auto")
    of_variant = _figures(
        variant_side, hashes[0], loaded_variant, items, replies[1], speeds[1], settings.kv_cache_dtype
    )
    is_right = [right(items, of_model) for of_model in replies]

    names = list(dict.fromkeys(item.task for item in items))
    limits, criteria = settings.limits, len(names) + 2  # with all tasks together, and the text
    tasks = {}
    for name in names:
        places = [index for index, item in enumerate(items) if item.task == name]
        base_right, variant_right = ([answers[place] for place in places] for answers in is_right)
        tasks[name] = judge_task(base_right, variant_right, limits, criteria)
    text = judge_text(losses, limits, criteria)
    total = judge_task(is_right[0], is_right[1], limits, criteria)
    verdict, reasons = overall(tasks, total, text, limits)
    evaluation = Evaluation(
        verdict=verdict,
        reasons=reasons,
        limits=limits,
        variant=of_variant,
        base=of_base,
        tasks=tasks,
        total=total,
        text=text,
        sources=sources,
        environment={key: str(value) for key, value in environment().items()},
    )
    return variant_side.folder, evaluation


@dataclasses.dataclass(frozen=True)
class SoloFigures:
    """What can be said of a model without a base."""

    figures: ModelFigures
    tasks: dict[str, Score]
    losses: TextLosses

    def as_json(self) -> bytes:
        """All figures, for a file."""
        tokens = sum(self.losses.tokens)
        content = {
            "model": self.figures,
            "tasks": {name: figures(of_task) for name, of_task in self.tasks.items()},
            "text": {"tokens": tokens, "perplexity": math.exp(sum(self.losses.base) / tokens)},
            "environment": environment(),
        }
        return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def measure_alone(model: str, settings: Settings, console: Console) -> SoloFigures:
    """Accuracy and perplexity of one model; raises as `compare` does."""
    items, samples, _ = questions_and_text(model, settings)
    side = Candidate(model, items, samples, settings)
    with console.status(f"hashing and loading {side.folder.name}"):
        content = hash_checkpoint(side.folder)
        loaded = _load(side, settings, side.longest, settings.kv_cache_dtype)
    with loaded:
        losses = _losses(loaded, loaded, side.sequences, console)
        replies = _ask(loaded, side, settings, console)
        (speeds,) = _speeds([loaded], side.prompts[0], settings, console)
    of_model = _figures(side, content, loaded, items, replies, speeds, settings.kv_cache_dtype)
    return SoloFigures(of_model, score(items, replies), losses)


def questions_and_text(model: str, settings: Settings) -> tuple[list[EvalItem], list[Sample], dict[str, str]]:
    """From the files that were named; otherwise the embedded models' own, for models with their vocabulary.

    Raises:
        ConfigError: a file cannot be read, or one is needed.
    """
    own = knows_embedded_tasks(find_model_folder(model))
    missing = [flag for flag, file in (("--tasks", settings.tasks), ("--text", settings.text)) if file is None]
    if missing and not own:
        raise ConfigError(
            f"{model} is none of the embedded models, so {' and '.join(missing)} must be given: JSON lines of "
            "questions with task, messages and answer; held-out text as plain text or JSON lines with text or messages"
        )
    items = embedded_items(SEED, settings.items) if settings.tasks is None else load_items(settings.tasks)
    samples = embedded_text(SEED, TEXT_PER_TASK) if settings.text is None else load_text(settings.text)
    generated = f"the embedded models' validation split, seed {SEED}"
    sources = {
        "tasks": settings.tasks.name if settings.tasks else f"{generated}, up to {settings.items} of each task",
        "text": settings.text.name if settings.text else f"{generated}, {TEXT_PER_TASK} of each task",
        "decoding": f"greedy, at most {settings.max_tokens} tokens, {settings.concurrency} at once",
    }
    return items, samples, sources


def _load(side: Candidate, settings: Settings, longest: int, kv_cache_dtype: str) -> LoadedModel:
    fields = dict(settings.engine)
    if kv_cache_dtype != "auto":
        fields["kv_cache_dtype"] = kv_cache_dtype
    waiting = len(side.prompts)
    return LoadedModel(side.folder, longest=longest, concurrency=settings.concurrency, waiting=waiting, **fields)


def _losses(
    base: LoadedModel, variant: LoadedModel, sequences: Sequence[ScoredSequence], console: Console
) -> TextLosses:
    with _bar(console, "held-out text", len(sequences)) as move:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            move(done)

        scorers = base.engine.shard.scorer(), variant.engine.shard.scorer()
        return compare_losses(*scorers, sequences, base.step_tokens, base.concurrency, advance)


def _ask(loaded: LoadedModel, side: Candidate, settings: Settings, console: Console) -> list[str]:
    with _bar(console, side.folder.name, len(side.prompts)) as move:
        return loaded.replies(side.prompts, side.tokenizer, settings.max_tokens, move)


def _speeds(
    models: Sequence[LoadedModel], prompt: list[int], settings: Settings, console: Console
) -> list[dict[str, float]]:
    """Tokens per second of every model, by the number of requests."""
    speeds: list[dict[str, float]] = [{} for _ in models]
    with console.status("measuring the speed"):
        for count in dict.fromkeys((1, settings.concurrency)):
            sides: dict[str, Callable[[], float]] = {
                str(index): functools.partial(model.tokens_per_second, count, prompt[:SPEED_PROMPT])
                for index, model in enumerate(models)
            }
            measured = measure_in_turn(sides, SPEED_RUNS)
            for index, of_model in enumerate(speeds):
                of_model[str(count)] = statistics.median(measured[str(index)])
    return speeds


def _figures(
    side: Candidate,
    content: CheckpointHash,
    loaded: LoadedModel,
    items: Sequence[EvalItem],
    replies: Sequence[str],
    speeds: dict[str, float],
    kv_cache_dtype: str,
) -> ModelFigures:
    json_replies = [reply for item, reply in zip(items, replies, strict=True) if is_json(item.answer)]
    return ModelFigures(
        model=side.folder.name,
        content=content,
        quantisation=side.spec.quantisation.label if side.spec.quantisation is not None else None,
        kv_cache_dtype=kv_cache_dtype,
        weight_bytes=loaded.weight_bytes,
        tokens_per_second=speeds,
        json_items=len(json_replies),
        json_valid=sum(map(is_json, json_replies)),
    )


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives the function that takes what is done."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
