"""`troupe quantize`: a model's weights in fewer bits, as a checkpoint in compressed-tensors format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...actors.openmp import bound_spinning
from ...cluster.errors import ConfigError
from ..model_folder import find_model_folder
from .options import Method, QuantiseOptions


def quantize_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder in Hugging Face format or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    method: Annotated[
        Method,
        typer.Option(
            help="rtn rounds to nearest; gptq makes up for each rounding with the weights still to come; awq scales "
            "inputs that carry much before it rounds."
        ),
    ] = Method.GPTQ,
    bits: Annotated[int, typer.Option(help="8, 4 or 3 for a weight. vLLM loads 8 and 4.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale; -1: one scale per output.")] = 128,
    asymmetric: Annotated[
        bool,
        typer.Option("--asymmetric", help="Every group has a zero point too. transformers 5.23 does not load that."),
    ] = False,
    activations: Annotated[
        str | None,
        typer.Option(
            help="int8: servers are to round activations to 8 bits, with a scale per token (W8A8); needs --bits 8 and "
            "--group-size -1. Default: they stay as they are."
        ),
    ] = None,
    head_bits: Annotated[
        int | None,
        typer.Option(help="8 or 4: round the output projection too, if it is not the embedding. Default: it stays."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with text, or with messages of a chat, to calibrate with. gptq and awq need it, but for "
            "the embedded models, which have their training chats."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Lines to calibrate with.")] = 512,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a line that are used at most.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the choice of lines.")] = 0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew instead of going on with what OUT has of an earlier run.")
    ] = False,
) -> None:
    """Write a model with quantised weights, in compressed-tensors format. Interrupted, it goes on where it was.

    Troupe serves what is written. Other programs may load less: transformers 5.23 neither --asymmetric nor mixtures of
    experts, vLLM no 3 bits.
    """
    if activations not in (None, "int8"):
        raise ConfigError(f"--activations {activations} is not supported; use int8, or leave it out")
    options = QuantiseOptions(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=not asymmetric,
        activation_bits=None if activations is None else 8,
        head_bits=head_bits,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
    )
    options.check()

    bound_spinning()
    from .calibration import calibration_sequences  # torch and what comes with it: the other commands need none of it
    from .quantiser import Quantiser

    source = find_model_folder(model)
    sequences = calibration_sequences(source, options)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=1.0)
        quantiser = Quantiser(
            source,
            out,
            options,
            sequences,
            restart=restart,
            report=lambda what, done: progress.update(task, description=what, completed=done),
        )
        summary = quantiser.run()
    console.print(summary.tables())
    console.print(
        f"Written to {out}. What was lost is not known yet: troupe eval {out} --against {model}", soft_wrap=True
    )
