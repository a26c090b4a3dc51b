"""A comparison as tables for the terminal."""

from __future__ import annotations

import math

from rich.table import Table

from ...cluster.evaluation_report import Evaluation, ModelFigures
from ...cluster.kv_memory import format_bytes
from .comparison import SoloFigures
from .intervals import wilson


def task_table(evaluation: Evaluation) -> Table:
    """A row per task."""
    table = _table(
        "exact match, greedy; loss in points with its 95 % interval",
        ["task", "items", evaluation.base.model, _variant(evaluation), "lost", "gained", "loss", "verdict"],
    )
    for name, task in {**evaluation.tasks, "all": evaluation.total}.items():
        if task is evaluation.total:
            table.add_section()
        table.add_row(
            name,
            str(task.items),
            f"{task.base_accuracy:.1%}",
            f"{task.accuracy:.1%}",
            str(task.lost),
            str(task.gained),
            f"{task.loss:+.1f} \\[{task.low:+.1f} … {task.high:+.1f}]",
            task.verdict.value,
        )
    return table


def text_table(evaluation: Evaluation) -> Table:
    """Figures of the held-out text."""
    text = evaluation.text
    table = _table(
        f"held-out text: {text.tokens} tokens in {text.sequences} sequences; in brackets 95 % intervals",
        ["", evaluation.base.model, _variant(evaluation), "ratio", "verdict"],
    )
    ratio = f"{text.ratio:.4f} \\[{text.low:.4f} … {text.high:.4f}]"
    table.add_row("perplexity", f"{text.base_perplexity:.4f}", f"{text.perplexity:.4f}", ratio, text.verdict.value)
    divergence = f"{text.kl_divergence:.3g} \\[{text.kl_low:.3g} … {text.kl_high:.3g}]"
    table.add_row("KL divergence per token, nats", "", divergence, "", "")
    table.add_row("same likeliest token", "", f"{text.top1_agreement:.2%}", "", "")
    return table


def model_table(*models: ModelFigures) -> Table:
    """Size, speed and well-formedness; the ratio is the last model's to the first's."""
    table = _table("size and speed", ["", *(_name(model) for model in models), *(["ratio"] if models[1:] else [])])
    first, last = models[0], models[-1]

    def row(what: str, cells: list[str], of_first: float | None = None, of_last: float | None = None) -> None:
        ratio = f"{of_last / of_first:.3f}" if of_first and of_last is not None else ""
        table.add_row(what, *cells, *([ratio] if models[1:] else []))

    row("weights", [model.quantisation or "as trained" for model in models])
    row("KV cache", [model.kv_cache_dtype for model in models])
    row("measured on", [f"{model.device}, {model.dtype}" for model in models])
    files = [model.content.weight_file_bytes for model in models]
    row("weight files", [format_bytes(size) for size in files], files[0], files[-1])
    in_memory = [format_bytes(model.weight_bytes) for model in models]
    row("weights in memory", in_memory, first.weight_bytes, last.weight_bytes)
    for count, speed in first.tokens_per_second.items():
        speeds = [model.tokens_per_second[count] for model in models]
        what = f"tokens/s, {count} request{'s' if count != '1' else ''}"
        row(what, [f"{value:.1f}" for value in speeds], speed, speeds[-1])
    if first.json_items:
        row("valid JSON where JSON is asked for", [_json(model) for model in models])
    row("replies cut at --max-tokens", [str(model.cut_replies) for model in models])
    return table


def solo_table(solo: SoloFigures) -> Table:
    """Accuracy per task and perplexity of a single model."""
    table = _table("exact match, greedy; in brackets the 95 % interval", ["task", "items", solo.figures.model])
    for name, score in solo.tasks.items():
        low, high = score.interval
        table.add_row(name, str(score.items), f"{score.accuracy:.1%} \\[{low:.1%} … {high:.1%}]")
    tokens = sum(solo.losses.tokens)
    table.add_row("perplexity", f"{tokens} tokens", f"{math.exp(sum(solo.losses.base) / tokens):.4f}")
    return table


def _json(model: ModelFigures) -> str:
    low, high = wilson(model.json_valid, model.json_items)
    return f"{model.json_valid / model.json_items:.1%} \\[{low:.1%} … {high:.1%}]"


def _name(model: ModelFigures) -> str:
    return model.model if model.kv_cache_dtype == "auto" else f"{model.model}, {model.kv_cache_dtype} KV"


def _variant(evaluation: Evaluation) -> str:
    return _name(evaluation.variant)


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    return table
