"""The command line: `troupe serve`, `quantize`, `eval`, `bench`, `router`, `explain` and `version`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from .. import __version__
from ..cluster.config import ServeConfig, load_config
from ..cluster.errors import CheckpointError, ConfigError, EngineError, TroupeError
from .bench.command import bench
from .evaluation.command import eval_command
from .local_machine import check_ports, local_capacity
from .model_folder import DEMO_MODELS
from .quantise.command import quantize_command
from .quiet_output import quiet_output
from .routing.command import router
from .routing.explain import explain_command
from .supervisor import supervise

EXIT_REFUSED = 2
"""The configuration or a model folder cannot be used; nothing was started."""
EXIT_FAILED = 1

cli = typer.Typer(
    help="Serve large language models on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli.command("eval")(eval_command)
cli.command("quantize")(quantize_command)
cli.command("explain")(explain_command)
cli.add_typer(bench, name="bench")
cli.add_typer(router, name="router")


@cli.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@cli.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL", help="Folders in Hugging Face format or hub ids. Default: the embedded models."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the same fields; the only way to configure models differently.")
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", "-tp", help="Shards that divide every layer.")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option("--pipeline-parallel-size", "-pp", help="Stages that divide the layers.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Replicas of each model.")] = None,
    min_replicas: Annotated[
        int | None, typer.Option(help="Autoscaling: fewest replicas of each model. Default: --replicas.")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Autoscaling: most replicas of each model. Default: --replicas.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    load_format: Annotated[
        str | None, typer.Option(help="auto, or dummy: random weights, for measuring without a checkpoint.")
    ] = None,
    allow_unevaluated: Annotated[
        bool | None,
        typer.Option(
            "--allow-unevaluated",
            help="Serve quantised models and 8-bit KV caches that `troupe eval` has not found good enough.",
        ),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and output together, in tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences that run at once.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens computed in one step.")] = None,
    max_num_waiting: Annotated[int | None, typer.Option(help="Requests that may wait; one more gets a 429.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per KV block.")] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(help="Part of a GPU's memory that may be in use, above 0 and at most 1. Default: 0.9."),
    ] = None,
    kv_cache_memory: Annotated[
        str | None, typer.Option(help="Per shard, such as 2GiB. Default: what is left on the device.")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(help="auto (as computed), int8 or fp8: with 8 bits the cache holds almost twice as much."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads per shard.")] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Dollars that a replica costs. Default: estimated from the model's size.")
    ] = None,
    enable_prefix_caching: Annotated[
        bool | None, typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="Default: enabled.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name in the API. Default: the folder's name.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default: 8000.")] = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Port of Ray's dashboard. Default: 8265.")] = None,
    ingress_replicas: Annotated[int | None, typer.Option(help="Processes that answer HTTP. Default: 1.")] = None,
) -> None:
    """Serve models behind the OpenAI API."""
    of_models = {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "replicas": replicas,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "dtype": dtype,
        "load_format": load_format,
        "allow_unevaluated": allow_unevaluated,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_num_waiting": max_num_waiting,
        "block_size": block_size,
        "gpu_memory_utilization": gpu_memory_utilization,
        "kv_cache_memory": kv_cache_memory,
        "kv_cache_dtype": kv_cache_dtype,
        "device": device,
        "num_threads": num_threads,
        "price_per_hour": price_per_hour,
        "enable_prefix_caching": enable_prefix_caching,
        "served_model_name": served_model_name,
    }
    of_application = {
        "host": host,
        "port": port,
        "dashboard_port": dashboard_port,
        "ingress_replicas": ingress_replicas,
    }
    try:
        given = merge_configuration(config, models or [], _given(of_models), _given(of_application))
        checked = check_ports(load_config(given))
    except ConfigError as error:
        raise typer.Exit(_report(error)) from None
    raise typer.Exit(supervise(lambda: _serve(checked)))


def merge_configuration(
    file: Path | None, models: list[str], of_models: dict[str, Any], of_application: dict[str, Any]
) -> dict[str, Any]:
    """The content of a configuration file with what was given on the command line.

    Flags about the application win over the file. Flags about models describe every MODEL of the command line; they
    cannot be combined with models in the file.

    Raises:
        ConfigError: the file cannot be read, or both describe models.
    """
    data = _read_yaml(file) if file is not None else {}
    if "models" in data:
        if models or of_models:
            given = models[0] if models else "--" + next(iter(of_models)).replace("_", "-")
            raise ConfigError(f"{given} was given, and {file} lists models as well; describe all models in the file")
    else:
        names = models or DEMO_MODELS
        if "served_model_name" in of_models and len(names) > 1:
            raise ConfigError(f"--served-model-name names one model, and {len(names)} are served; use --config")
        data["models"] = [{"model": _full_name(name), **of_models} for name in names]
    return {**data, **of_application}


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {file} is not YAML: {reason}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"--config {file} holds a {type(data).__name__}; a mapping with the key models is needed")
    return data


def _full_name(model: str) -> str:
    """A relative path without a name of its own, such as `.`, as an absolute one."""
    return model if Path(model).name not in ("", "..") else str(Path(model).resolve())


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _serve(config: ServeConfig) -> int:
    """Check what can be checked, start, and run until interrupted; the exit status."""
    from ..actors.placement import scaling_notices
    from .routing.classifier_file import read_classifier
    from .served_model import resolve_models

    capacity = local_capacity()
    try:
        read_classifier(config.router, [model.name for model in config.models])
        models = resolve_models(config.models, capacity)
    except TroupeError as error:
        return _report(error)

    for line in scaling_notices([model.config for model in models], [model.device for model in models], capacity):
        print(f"note: {line}", file=sys.stderr)

    from .serving import Serving

    serving = Serving(config, models, capacity)
    failure = None
    try:
        with quiet_output(serving.cluster.log) as terminal:
            serving.start(Console(file=terminal))
            serving.run()
    except TroupeError as error:
        failure = EngineError(f"{error} (logs: {serving.cluster.folder})")
    finally:
        serving.stop(keep_logs=failure is not None)
    return _report(failure) if failure else 0


def _report(error: TroupeError) -> int:
    """Say what is wrong, one line per fault; the exit status."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return EXIT_REFUSED if isinstance(error, ConfigError | CheckpointError) else EXIT_FAILED


def main() -> None:
    """Entry point of the `troupe` command."""
    try:
        cli()
    except TroupeError as error:
        sys.exit(_report(error))


if __name__ == "__main__":
    main()
