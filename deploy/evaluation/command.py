"""`troupe eval`: how good the answers of a server or of a model folder are, and what a variant of a model has lost."""

from __future__ import annotations

import enum
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...actors.openmp import bound_spinning
from ...cluster.errors import CheckpointError, ConfigError
from ...cluster.evaluation_report import (
    REPORT_FILE,
    Evaluation,
    EvaluationReport,
    Limits,
    Verdict,
    check_writable,
    read_report,
    write_report,
)
from ..model_folder import find_model_folder
from .items import DEMO_TASKS

EXIT_NOT_PASSED = 3
"""The evaluation was done, and its verdict is not a pass."""
_FOR_SERVERS = ("target", "model", "tasks", "concurrency", "max_tokens", "output")
_FOR_COMPARISONS = ("report", "max_loss", "max_margin", "max_perplexity_increase")


class KVCacheDtype(enum.StrEnum):
    """Types of the KV cache."""

    AUTO = "auto"
    INT8 = "int8"
    FP8 = "fp8"


def eval_command(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="URL|MODEL",
            help="Base address of an OpenAI-compatible API; or a model folder, hub id or embedded model's name.",
        ),
    ] = "http://127.0.0.1:8000/v1",
    against: Annotated[
        str | None, typer.Option(help="Model that MODEL is a variant of, to compare with and judge by.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Of a server: model to ask; may be repeated. Default: all.")
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="Questions and answers as JSON lines. Default: the embedded models' tasks.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Held-out text: plain, or JSON lines with text or messages. Default: chats of these tasks."),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Questions of each of the embedded models' tasks.")] = 400,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a sequence of plain text.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 128,
    kv_cache_dtype: Annotated[KVCacheDtype, typer.Option(help="Of MODEL; BASE runs as it is.")] = KVCacheDtype.AUTO,
    max_loss: Annotated[
        float, typer.Option(min=0, help="Points that any one task may lose, beside the statistical margin.")
    ] = Limits().max_loss,
    max_margin: Annotated[
        float, typer.Option(min=0.1, help="Points of margin above which there is no pass.")
    ] = Limits().max_margin,
    max_perplexity_increase: Annotated[float, typer.Option(min=0, help="Per cent.")] = Limits().max_perplexity_increase,
    dtype: Annotated[str, typer.Option(help="Of both models: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    num_threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(help=f"Write the report here, and not to MODEL/{REPORT_FILE}, where alone serve looks."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write all figures here as JSON.")] = None,
) -> None:
    """Measure the accuracy of a running server, or what a model has lost against another."""
    if output is not None:
        check_writable(output)
    if target.startswith(("http://", "https://")):
        if flags := _given(context, [name for name in context.params if name not in _FOR_SERVERS]):
            raise ConfigError(f"{target} is a server, and {flags} can only be said of a model folder; leave it out")
        from .server import evaluate_server

        evaluate_server(target, model, tasks or DEMO_TASKS, concurrency, max_tokens, output)
        return
    if model:
        raise ConfigError(f"--model {model[0]} chooses a model of a server, and {target} is none")
    if against is None and (flags := _given(context, _FOR_COMPARISONS)):
        raise ConfigError(f"{flags} judges or stores a comparison; name the model to compare with: --against BASE")
    place = report or find_model_folder(target) / REPORT_FILE
    if against is not None:
        check_writable(place)

    bound_spinning()
    from .comparison import Settings, compare, measure_alone  # with torch, which the other commands do without
    from .tables import model_table, solo_table, task_table, text_table

    settings = Settings(
        tasks=tasks,
        text=text,
        items=items,
        window=window,
        max_tokens=max_tokens,
        concurrency=concurrency,
        limits=Limits(max_loss=max_loss, max_margin=max_margin, max_perplexity_increase=max_perplexity_increase),
        engine={"dtype": dtype, "device": device, "num_threads": num_threads},
        kv_cache_dtype=kv_cache_dtype.value,
    )
    console = Console(width=max(120, Console().width))
    if against is None:
        solo = measure_alone(target, settings, console)
        console.print(solo_table(solo), model_table(solo.figures))
        if output is not None:
            output.write_bytes(solo.as_json())
        return
    evaluation = compare(target, against, settings, console)
    console.print(task_table(evaluation), text_table(evaluation), model_table(evaluation.base, evaluation.variant))
    if output is not None:
        write_report(output, EvaluationReport(evaluations={kv_cache_dtype.value: evaluation}))
    store(place, evaluation)
    for reason in evaluation.reasons:
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
    if laxer := settings.limits.laxer_than_default:
        reason = f"{', '.join(laxer)}: limits that lax are not what `troupe serve` takes for a pass"
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
    console.print(f"verdict: {evaluation.verdict.value} ({place})", markup=False, highlight=False, soft_wrap=True)
    if evaluation.verdict is not Verdict.PASS:
        raise typer.Exit(EXIT_NOT_PASSED)


def _given(context: typer.Context, names: Collection[str]) -> str:
    """The flags of these parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    return ", ".join(parameter.opts[0] for parameter in context.command.params if parameter.name in given)


def store(path: Path, evaluation: Evaluation) -> None:
    """Put an evaluation into the report at `path`, beside those of the same weights with other KV caches.

    Raises:
        CheckpointError: it cannot be written there.
    """
    try:
        before = read_report(path)
    except CheckpointError:  # of another version, or damaged: it is made anew
        before = None
    content = evaluation.variant.content.sha256
    kept = {
        kv_cache: other
        for kv_cache, other in (before.evaluations if before is not None else {}).items()
        if other.variant.content.sha256 == content
    }
    write_report(path, EvaluationReport(evaluations={**kept, evaluation.variant.kv_cache_dtype: evaluation}))
