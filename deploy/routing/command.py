"""`troupe router fit`: which prompts a cheaper model answers as well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...actors.openmp import bound_spinning
from ...cluster.errors import ConfigError
from ...router.classifier import TokenCosts
from ..model_folder import DEMO_MODELS

router = typer.Typer(help="Decide which model answers what.", no_args_is_help=True)


@router.callback()
def _group() -> None:
    """With one command, typer would leave its name out."""


@router.command("fit")
def fit_command(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATA]",
            help="Questions and answers as JSON lines, as of troupe eval. Default: the training questions of the "
            "embedded models' tasks, judged by their validation questions.",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            help="Model folder, hub id or embedded model's name, NAME=MODEL if served under another name; may be "
            "repeated, and one value may name several with commas. Default: the embedded models."
        ),
    ] = None,
    quality: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the best model's right answers to keep, to show a choice.")
    ] = 0.99,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("router.json"),
    labels: Annotated[
        Path | None, typer.Option(help="File that keeps all answers for the next fit. Default: beside OUT.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Further questions, only to judge with. The curve does without.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Questions of each of the embedded models' tasks.")] = 400,
    price: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=IN,OUT",
            help="Dollars per million tokens of prompts and of output; for every model or none. Default: estimated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of embedded questions, of the division into parts, and of intervals.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions under way at once.")] = 32,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    num_threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Ask all models the questions, and learn which prompts a cheaper one answers as well as the best.

    The file that is written is for `classifier` in the configuration's `router`.
    """
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    prices = dict(parse_price(text) for text in price or [])
    chosen = [name for value in models or DEMO_MODELS for name in value.split(",") if name]
    bound_spinning()
    from .router_fit import FitOptions, router_fit  # with torch and scikit-learn, which the other commands do without

    options = FitOptions(
        models=chosen,
        data=data,
        items=items,
        test=test,
        quality=quality,
        out=out,
        labels=labels or out.with_suffix(".labels.jsonl"),
        prices=prices,
        seed=seed,
        max_tokens=max_tokens,
        concurrency=concurrency,
        engine={"dtype": dtype, "device": device, "num_threads": num_threads},
    )
    router_fit(options, Console(width=max(150, Console().width)))


def parse_price(text: str) -> tuple[str, TokenCosts]:
    """`NAME=IN,OUT` in dollars per million tokens. Raises ConfigError."""
    name, _, numbers = text.rpartition("=")
    try:
        prompt, output = map(float, numbers.split(","))
        if not (name and 0 <= prompt < 1e9 and 0 <= output < 1e9):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--price {text!r}: write NAME=IN,OUT in dollars per million tokens, such as demo-large=0.5,1.5"
        ) from None
    return name, TokenCosts(prompt / 1e6, output / 1e6)
