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

from ...cluster.errors import ConfigError
from ...cluster.evaluation_report import Evaluation, Limits, ModelFigures
from ..bench.report import environment, measure_in_turn
from ..model_folder import find_model_folder
from .candidate import Candidate, check_comparable, check_differing
from .held_out_text import Sample, ScoredSequence, embedded_text, knows_embedded_tasks, load_text
from .items import EvalItem, embedded_items, json_replies, load_items, right
from .loaded_model import LoadedModel, Replies
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


def compare(model: str, base: str, settings: Settings, console: Console) -> Evaluation:
    """Measure both models and judge the first.

    Raises:
        ConfigError: questions, text or models do not go together. CheckpointError: a model cannot be loaded.
    """
    items, samples, sources = questions_and_text(model, settings)
    variant_side = _candidate(model, items, samples, settings, settings.kv_cache_dtype)
    base_side = _candidate(base, items, samples, settings, "auto")
    check_comparable(variant_side, base_side)
    with console.status("hashing the checkpoints"):
        variant_side.read_content()
        base_side.read_content()
    check_differing(variant_side, base_side)
    longest = max(variant_side.longest, base_side.longest)
    with ExitStack() as stack:
        with console.status(f"loading {base_side.folder.name} and {variant_side.folder.name}"):
            loaded_base = stack.enter_context(_load(base_side, settings, longest))
            loaded_variant = stack.enter_context(_load(variant_side, settings, longest))
        losses = _losses(loaded_base, loaded_variant, base_side.sequences, console)
        replies = [
            _ask(loaded, side, settings, console)
            for loaded, side in ((loaded_base, base_side), (loaded_variant, variant_side))
        ]
        speeds = _speeds([loaded_base, loaded_variant], base_side.prompts[0], settings, console)
    of_base = _figures(base_side, loaded_base, items, replies[0], speeds[0])
    of_variant = _figures(variant_side, loaded_variant, items, replies[1], speeds[1])
    is_right = [right(items, of_model.texts) for of_model in replies]

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
    return Evaluation(
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
    side = _candidate(model, items, samples, settings, settings.kv_cache_dtype)
    with console.status(f"hashing and loading {side.folder.name}"):
        side.read_content()
        loaded = _load(side, settings, side.longest)
    with loaded:
        losses = _losses(loaded, loaded, side.sequences, console)
        replies = _ask(loaded, side, settings, console)
        (speeds,) = _speeds([loaded], side.prompts[0], settings, console)
    of_model = _figures(side, loaded, items, replies, speeds)
    return SoloFigures(of_model, score(items, replies.texts), losses)


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


def _candidate(
    model: str, items: Sequence[EvalItem], samples: Sequence[Sample], settings: Settings, kv_cache_dtype: str
) -> Candidate:
    return Candidate(
        model,
        items,
        samples,
        window=settings.window,
        max_tokens=settings.max_tokens,
        kv_cache_dtype=kv_cache_dtype,
    )


def _load(side: Candidate, settings: Settings, longest: int) -> LoadedModel:
    return LoadedModel(
        side.folder,
        longest=longest,
        concurrency=settings.concurrency,
        waiting=len(side.prompts),
        kv_cache_dtype=side.kv_cache_dtype,
        **settings.engine,
    )


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


def _ask(loaded: LoadedModel, side: Candidate, settings: Settings, console: Console) -> Replies:
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
    side: Candidate, loaded: LoadedModel, items: Sequence[EvalItem], replies: Replies, speeds: dict[str, float]
) -> ModelFigures:
    valid = json_replies(items, replies.texts)
    return ModelFigures(
        model=side.folder.name,
        content=side.content,
        quantisation=side.spec.quantisation.label if side.spec.quantisation is not None else None,
        kv_cache_dtype=side.kv_cache_dtype,
        device=loaded.device,
        dtype=loaded.dtype,
        weight_bytes=loaded.weight_bytes,
        tokens_per_second=speeds,
        json_items=len(valid),
        json_valid=sum(valid),
        cut_replies=replies.cut,
    )


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives the function that takes what is done."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
