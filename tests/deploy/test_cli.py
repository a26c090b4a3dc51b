"""The command line and the configuration file are two ways to write one configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raytroupe import __version__
from raytroupe.cluster.config import load_config
from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy import cli
from raytroupe.deploy.model_folder import DEMO_MODELS


def troupe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raytroupe.deploy.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_without_arguments_the_embedded_models_are_served() -> None:
    config = load_config(cli.merge_configuration(None, [], {}, {}))
    assert [model.name for model in config.models] == ["demo-large", "demo-small"]
    assert [model.model for model in config.models] == DEMO_MODELS
    assert (config.host, config.port) == ("127.0.0.1", 8000)


def test_flags_describe_every_model_of_the_command_line() -> None:
    data = cli.merge_configuration(None, ["a/b", "c"], {"tensor_parallel_size": 2}, {"port": 9000})
    config = load_config(data)
    assert [(model.name, model.tensor_parallel_size) for model in config.models] == [("b", 2), ("c", 2)]
    assert config.port == 9000


def test_file_gives_what_flags_cannot_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("port: 1234\nmodels:\n- {model: a, replicas: 2}\n- {model: b, kv_cache_memory: 1GiB}\n")
    config = load_config(cli.merge_configuration(file, [], {}, {"port": 9000}))
    assert config.port == 9000
    assert [(model.name, model.replicas, model.kv_cache_memory) for model in config.models] == [
        ("a", 2, None),
        ("b", 1, 2**30),
    ]


def test_file_without_models_takes_those_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "application.yaml"
    file.write_text("ingress_replicas: 2\n")
    config = load_config(cli.merge_configuration(file, ["a"], {}, {}))
    assert (config.ingress_replicas, config.models[0].name) == (2, "a")


@pytest.mark.parametrize(
    ("models", "flags", "named"),
    [(["extra"], {}, "extra"), ([], {"tensor_parallel_size": 2}, "--tensor-parallel-size")],
)
def test_models_are_described_in_one_place(
    tmp_path: Path, models: list[str], flags: dict[str, object], named: str
) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("models: [{model: a}]\n")
    with pytest.raises(ConfigError, match=rf"^{named} was given, and .*models\.yaml lists models as well"):
        cli.merge_configuration(file, models, flags, {})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("- a\n", "holds a list"), ("models: [", "is not YAML"), ("\xff\xfe", "is not YAML"), (None, "No such file")],
)
def test_unusable_file_is_refused(tmp_path: Path, content: str | None, complaint: str) -> None:
    file = tmp_path / "models.yaml"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=complaint):
        cli.merge_configuration(file, [], {}, {})


def test_one_name_for_several_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="--served-model-name names one model, and 2 are served"):
        cli.merge_configuration(None, [], {"served_model_name": "x"}, {})


def test_current_folder_is_served_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(cli.merge_configuration(None, ["."], {}, {}))
    assert config.models[0].name == tmp_path.name


def test_version() -> None:
    assert troupe("version").stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("-tp", "3"), "tensor_parallel_size = 3 does not fit 2 KV heads"),
        (("-pp", "7"), "pipeline_parallel_size = 7 exceeds the model's 6 layers"),
        (("--replicas", "1000"), "need 2000 cpu shards, and the cluster has room for"),
        (("--device", "cuda"), "need 2 cuda shards, and the cluster has room for 0"),
        (("--max-model-len", "4096"), "max_model_len = 4096 exceeds the context of demo-large (2048 tokens)"),
        (("--kv-cache-memory", "1MiB"), "of max_model_len = 2048 needs"),
        (("--kv-cache-memory", "lots"), "models.0.kv_cache_memory = 'lots': not a memory size"),
        (("--block-size", "24"), "models.0.block_size = 24: must be a power of two"),
        (("--dtype", "int4"), "models.0.dtype = 'int4': Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        (("--port", "70000"), "port = 70000: Input should be less than or equal to 65535"),
        (("a/x", "b/x"), "models share the name 'x'"),
    ],
)
def test_impossible_configuration_is_refused_before_anything_starts(arguments: tuple[str, ...], complaint: str) -> None:
    done = troupe("serve", *arguments)
    assert done.returncode == cli.EXIT_REFUSED
    assert done.stdout == ""
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    assert complaint in done.stderr
