"""The commands `troupe bench serve` and `troupe bench engine`: options to settings, settings to a report.

What takes time to import is imported when a command runs, so that `troupe --help` stays fast.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ...cluster.errors import ConfigError

EXIT_INTERRUPTED = 130
EXIT_NOTHING_COMPLETED = 1

bench = typer.Typer(
    help="Measure a server over HTTP, or the engine in this process.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@bench.command()
def serve(
    url: Annotated[str, typer.Argument(help="Address of an OpenAI-compatible server, such as http://127.0.0.1:8000.")],
    model: Annotated[str | None, typer.Option(help="Default: the only one that the server lists.")] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loops of so many clients, such as 1,8,32 (the default).")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Open loops of Poisson arrivals, in requests/s, such as 2,4,8 or inf.")
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Per load. Default: 4 per client, at least 16; 30 s of arrivals; a whole trace."),
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds per load in which requests are sent.")] = None,
    prompt: Annotated[
        str, typer.Option(help="Prompt tokens: 128, uniform:64:256, normal:MEAN:DEVIATION, lognormal:MEAN:SIGMA, …")
    ] = "128",
    output_len: Annotated[str, typer.Option("--output", help="Output tokens, in the same forms.")] = "64",
    longest: Annotated[int | None, typer.Option(min=1, help="Longest drawn prompt, and longest drawn output.")] = None,
    prefix_groups: Annotated[int, typer.Option(min=0, help="Shared prefixes: how many there are.")] = 0,
    prefix_len: Annotated[int, typer.Option(min=0, help="Shared prefixes: tokens of each, before --prompt.")] = 0,
    trace: Annotated[Path | None, typer.Option(help="Arrivals and lengths from a recorded load.")] = None,
    trace_format: Annotated[str, typer.Option(help="auto, mooncake or burstgpt.")] = "auto",
    time_scale: Annotated[float, typer.Option(help="Multiplies the times of a trace; 0.5 is twice as fast.")] = 1.0,
    length_scale: Annotated[float, typer.Option(help="Multiplies the lengths of a trace.")] = 1.0,
    prompt_form: Annotated[str, typer.Option(help="tokens (ids) or text.")] = "tokens",
    endpoint: Annotated[str, typer.Option(help="completions or chat; chat needs --prompt-form text.")] = "completions",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Model folder whose tokenizer makes texts exact to the token.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=17, help="Prompt token ids are below this. Default: found by trying.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    prompt_seed: Annotated[
        int | None, typer.Option(min=0, help="Of the tokens. Default: new ones, which no cache has seen.")
    ] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests sent before anything is measured.")] = 4,
    slo: Annotated[str | None, typer.Option(help="Limits for goodput, such as ttft:500ms,tpot:50ms,e2e:10s.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of full length, if the server knows how.")] = True,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="NAME:VALUE", help="Further header; may be repeated.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures: FILE.png, .svg or .pdf.")] = None,
) -> None:
    """Measure latency, throughput and goodput of any OpenAI-compatible server."""
    from rich.console import Console

    from . import serve_report
    from .lengths import parse_lengths
    from .plot import check_plot_file, plot_serve
    from .serve import Load, ServeSettings, run
    from .summary import parse_limits
    from .workload import SharedPrefixes

    if (prefix_groups > 0) != (prefix_len > 0):
        raise ConfigError(
            f"--prefix-groups {prefix_groups} and --prefix-len {prefix_len}: shared prefixes need both, from 1 on"
        )
    if trace is None and (time_scale, length_scale, trace_format) != (1.0, 1.0, "auto"):
        raise ConfigError("--time-scale, --length-scale and --trace-format describe a trace; name it with --trace")
    loads = [Load(concurrency=int(count)) for count in parse_numbers("--concurrency", concurrency, whole=True)]
    loads += [Load(rate=given) for given in parse_numbers("--rate", rate)]
    if not loads:
        loads = [Load()] if trace is not None else [Load(concurrency=count) for count in (1, 8, 32)]
    settings = ServeSettings(
        url=url,
        loads=loads,
        prompt=parse_lengths(prompt, "--prompt", longest),
        output=parse_lengths(output_len, "--output", longest),
        model=model,
        requests=requests,
        duration=positive("--duration", duration),
        warm_up=warm_up,
        prefixes=SharedPrefixes(prefix_groups, prefix_len) if prefix_groups else None,
        trace=trace,
        trace_format=trace_format,
        time_scale=positive("--time-scale", time_scale),
        length_scale=positive("--length-scale", length_scale),
        chat=one_of("--endpoint", endpoint, "completions", "chat") == "chat",
        text=one_of("--prompt-form", prompt_form, "tokens", "text") == "text",
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        seed=seed,
        prompt_seed=prompt_seed,
        limits=parse_limits(slo) if slo is not None else {},
        ignore_eos=ignore_eos,
        temperature=temperature,
        headers=parse_headers(header or [], api_key),
        timeout=positive("--timeout", timeout),
    )
    if plot is not None:
        check_plot_file(plot)
    result = run(settings, Console(stderr=True))
    if result.measured:
        serve_report.show(result, settings)
        if json_file is not None:
            serve_report.write_json(result, settings, json_file)
        if plot is not None:
            plot_serve(result, plot)
    if result.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not any(of_load.summary.completed for of_load in result.measured):
        raise typer.Exit(EXIT_NOTHING_COMPLETED)


@bench.command()
def engine(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder, hub id, demo-large or demo-small. Default: the benchmark model, made if missing."),
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = "1,8,32",
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens of every request.")] = 128,
    output_len: Annotated[int, typer.Option("--output", min=2, help="Generated tokens of every request.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each point; the table has medians.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 (default) or float16.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    kv_cache_memory: Annotated[
        str | None, typer.Option(help="Such as 2GiB. Default: what is left on the device.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per KV block.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens computed in one step.")] = None,
    field: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other field of a model's configuration.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures: FILE.png, .svg or .pdf.")] = None,
) -> None:
    """Measure prefill and decode of the engine in this process, without Ray and HTTP."""
    from rich.console import Console

    from .engine import EngineSettings, run, show
    from .plot import check_plot_file, plot_engine

    flags: dict[str, Any] = {
        "dtype": dtype,
        "num_threads": num_threads,
        "device": device,
        "kv_cache_memory": kv_cache_memory,
        "block_size": block_size,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    settings = EngineSettings(
        model=model,
        concurrency=[int(count) for count in parse_numbers("--concurrency", concurrency, whole=True)],
        prompt=prompt,
        output=output_len,
        repeats=repeats,
        fields={name: value for name, value in flags.items() if value is not None} | parse_fields(field or []),
    )
    if plot is not None:
        check_plot_file(plot)
    report = run(settings, Console(stderr=True))
    if report.rows:
        show(report)
        if json_file is not None:
            report.write(json_file)
        if plot is not None:
            plot_engine(report, plot)
    if report.notes["interrupted"]:
        raise typer.Exit(EXIT_INTERRUPTED)


def parse_numbers(option: str, text: str | None, *, whole: bool = False) -> list[float]:
    """Positive numbers separated by commas; `inf` unless they have to be whole.

    Raises:
        ConfigError: anything else.
    """
    if text is None:
        return []
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [0.0]
    if not all(number > 0 and (not whole or number.is_integer()) for number in numbers):
        form = "whole numbers from 1 on" if whole else "positive numbers or inf"
        raise ConfigError(f"{option} {text!r}: write {form}, separated by commas")
    return numbers


def positive(option: str, value: float | None) -> Any:
    """`value` if it is None or a positive finite number.

    Raises:
        ConfigError: it is not.
    """
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"{option} {value:g}: must be a positive number")
    return value


def one_of(option: str, value: str, *choices: str) -> str:
    """`value` if it is one of `choices`.

    Raises:
        ConfigError: it is not.
    """
    if value not in choices:
        raise ConfigError(f"{option} {value}: choose {' or '.join(choices)}")
    return value


def parse_headers(given: list[str], api_key: str | None) -> dict[str, str]:
    """`NAME:VALUE` texts to headers, with the key as a bearer token.

    Raises:
        ConfigError: one is not of that form, or has characters that no header can hold.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    for text in given:
        name, colon, value = text.partition(":")
        if not (colon and name.strip()):
            raise ConfigError(f"--header {text!r}: write NAME:VALUE")
        headers[name.strip().lower()] = value.strip()
    for name, value in headers.items():
        if not (name + value).isprintable() or not (name + value).isascii() or " " in name:
            raise ConfigError(f"header {name!r}: only printable ASCII characters can be sent")
    return headers


def parse_fields(given: list[str]) -> dict[str, str]:
    """`NAME=VALUE` texts to fields.

    Raises:
        ConfigError: one is not of that form.
    """
    fields = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name):
            raise ConfigError(f"--field {text!r}: write NAME=VALUE, such as max_num_batched_tokens=4096")
        fields[name] = value
    return fields
