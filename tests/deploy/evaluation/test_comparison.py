"""`troupe eval MODEL --against BASE` on an embedded model and damaged copies of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from raytroupe.actors.placement import Capacity
from raytroupe.cluster.checkpoint_hash import hash_checkpoint
from raytroupe.cluster.config import ModelConfig
from raytroupe.cluster.errors import CheckpointError, ConfigError
from raytroupe.cluster.evaluation_report import REPORT_FILE, Evaluation, Verdict, read_report
from raytroupe.deploy.cli import cli
from raytroupe.deploy.evaluation import comparison
from raytroupe.deploy.evaluation.command import EXIT_NOT_PASSED
from raytroupe.deploy.evaluation.held_out_text import embedded_text
from raytroupe.deploy.evaluation.items import embedded_items
from raytroupe.deploy.model_folder import DEMO_MODELS
from raytroupe.deploy.served_model import resolve_models

TASKS = ("capital", "json_extraction")
INT8_CACHE = ("--kv-cache-dtype", "int8", "--device", "cpu", "--dtype", "float32")
"""A variant of which everybody knows what it was made of, and that loses next to nothing."""


def copy_of_small(folder: Path, scale: float = 1.0) -> Path:
    """The smaller embedded model with its last layer's output projections scaled."""
    shutil.copytree(DEMO_MODELS[1], folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.1.{name}.weight"] *= scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments for a task file and a text of a few items."""
    folder = tmp_path_factory.mktemp("files")
    items = [item for item in embedded_items(seed=5, per_task=64) if item.task in TASKS]
    (folder / "tasks.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, items)))
    text = [{"messages": sample.messages} for sample in embedded_text(seed=5, per_task=3)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, text)))
    return ("--tasks", str(folder / "tasks.jsonl"), "--text", str(folder / "text.jsonl"), "--max-tokens", "48")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["eval", *arguments], catch_exceptions=False)


def test_what_lost_nothing_passes_and_is_served(tmp_path: Path, files: tuple[str, ...]) -> None:
    variant = Path(shutil.copytree(DEMO_MODELS[0], tmp_path / "same"))
    result = run(str(variant), "--against", "demo-large", *files, *INT8_CACHE)
    assert result.exit_code == 0, result.output
    assert f"verdict: pass ({variant / REPORT_FILE})" in result.output
    report = read_report(variant / REPORT_FILE)
    assert report is not None
    evaluation = report.evaluations["int8"]
    assert evaluation.verdict is Verdict.PASS
    assert evaluation.reasons == []
    assert evaluation.variant.content == hash_checkpoint(variant)
    assert evaluation.base.content == hash_checkpoint(Path(DEMO_MODELS[0]))
    assert list(evaluation.tasks) == list(TASKS)
    assert (evaluation.tasks["capital"].lost, evaluation.tasks["capital"].items) == (0, 64)
    assert evaluation.tasks["capital"].accuracy > 0.9
    assert 0 < evaluation.text.kl_divergence < 1e-3
    assert evaluation.text.ratio == pytest.approx(1, abs=1e-3)
    assert (evaluation.variant.device, evaluation.variant.dtype) == ("cpu", "float32")
    assert evaluation.variant.cut_replies == 0
    assert evaluation.variant.json_items == 64
    assert evaluation.variant.json_valid > 0
    assert set(evaluation.variant.tokens_per_second) == {"1", "32"}
    assert evaluation.variant.weight_bytes == evaluation.base.weight_bytes > 0
    resolve_models([ModelConfig(model=str(variant), kv_cache_dtype="int8")], Capacity(cpus=2, gpus=0))


def test_damaged_copy_fails_with_reasons_and_replaces_the_report(tmp_path: Path, files: tuple[str, ...]) -> None:
    variant = copy_of_small(tmp_path / "damaged", scale=0.3)
    (variant / REPORT_FILE).write_text("not a report")
    figures = tmp_path / "figures.json"
    result = run(str(variant), "--against", "demo-small", *files, "--max-margin", "8", "--output", str(figures))
    assert result.exit_code == EXIT_NOT_PASSED
    assert "task capital lost" in result.output
    assert "perplexity rose by" in result.output
    assert "--max-margin 8 (default 5): limits that lax are not what `troupe serve` takes for a pass" in result.output
    report = read_report(variant / REPORT_FILE)
    assert report == read_report(figures)
    assert report is not None
    assert report.evaluations["auto"].verdict is Verdict.FAIL
    assert report.evaluations["auto"].text.top1_agreement < 1


def test_too_few_questions_are_undecided(tmp_path: Path, files: tuple[str, ...]) -> None:
    report = tmp_path / "elsewhere.json"
    margin = ("--max-margin", "3")
    result = run("demo-small", "--against", "demo-small", *files, *INT8_CACHE, *margin, "--report", str(report))
    assert result.exit_code == EXIT_NOT_PASSED
    assert "more items of task capital needed" in result.output
    assert "beyond base" in result.output  # json_extraction
    assert f"verdict: undecided ({report})" in result.output
    assert not (Path(DEMO_MODELS[1]) / REPORT_FILE).exists()


def quantised(folder: Path) -> Path:
    """The smaller embedded model with a config that says that it is quantised; nobody gets as far as its weights."""
    shutil.copytree(DEMO_MODELS[1], folder)
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 64}')
    return folder


def changed(folder: Path, **fields: object) -> Path:
    """The smaller embedded model with another config."""
    shutil.copytree(DEMO_MODELS[1], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_quantised_base_is_refused(tmp_path: Path, files: tuple[str, ...]) -> None:
    variant = quantised(tmp_path / "small-int4")
    with pytest.raises(ConfigError, match=r"small-int4 is quantised itself \(int4 g64\), so nothing"):
        run(str(variant), "--against", str(variant), *files, *INT8_CACHE)


def test_base_of_another_shape_is_refused(tmp_path: Path, files: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="demo-large was not made of demo-small, since they differ in hidden_size: "):
        run("demo-large", "--against", "demo-small", *files, "--report", str(tmp_path / "report.json"))
    padded = changed(tmp_path / "padded", vocab_size=4160)
    with pytest.raises(ConfigError, match="padded was not made of demo-small, since they differ in vocab_size: 4160 "):
        run(str(padded), "--against", "demo-small", *files)


def test_base_of_another_dtype_is_the_same_model(tmp_path: Path, files: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="the same weights and KV cache"):
        run(str(changed(tmp_path / "half", dtype="float16")), "--against", "demo-small", *files)


def test_model_is_not_compared_with_itself(tmp_path: Path, files: tuple[str, ...]) -> None:
    copied = Path(shutil.copytree(DEMO_MODELS[1], tmp_path / "copied"))
    with pytest.raises(ConfigError, match="have the same weights and KV cache, so there is nothing to compare"):
        run(str(copied), "--against", "demo-small", *files)
    assert not (copied / REPORT_FILE).exists()


@pytest.mark.parametrize("flag", ["--report", "--output"])
def test_place_that_cannot_be_written_is_found_before_anything_is_loaded(tmp_path: Path, flag: str) -> None:
    """The folder that is named as the model is empty, which would be the next error."""
    with pytest.raises(CheckpointError, match=r"none/report\.json cannot be written: .*evaluate and serve a copy"):
        run(str(tmp_path), "--against", str(tmp_path), flag, str(tmp_path / "none" / "report.json"))


def test_output_is_written_though_the_report_cannot_be(
    tmp_path: Path, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report's folder goes away while both models are measured."""
    gone = tmp_path / "gone"
    gone.mkdir()
    compare = comparison.compare

    def compare_and_remove(*arguments: Any) -> Evaluation:
        evaluation = compare(*arguments)
        shutil.rmtree(gone)
        return evaluation

    monkeypatch.setattr(comparison, "compare", compare_and_remove)
    places = ("--report", str(gone / "report.json"), "--output", str(tmp_path / "figures.json"))
    with pytest.raises(CheckpointError, match=r"gone/report\.json cannot be written"):
        run("demo-small", "--against", "demo-small", *files, *INT8_CACHE, "--concurrency", "16", *places)
    assert read_report(tmp_path / "figures.json") is not None


def test_model_alone_is_measured_without_a_verdict(tmp_path: Path, files: tuple[str, ...]) -> None:
    figures = tmp_path / "figures.json"
    result = run("demo-small", *files, "--output", str(figures))
    assert result.exit_code == 0
    assert "verdict" not in result.output
    written = json.loads(figures.read_text())
    assert written["tasks"]["capital"]["items"] == 64
    assert 1 < written["text"]["perplexity"] < 2


def test_replies_that_were_cut_are_counted(tmp_path: Path, files: tuple[str, ...]) -> None:
    figures = tmp_path / "figures.json"
    result = run("demo-small", *files, "--max-tokens", "2", "--output", str(figures))
    assert result.exit_code == 0
    assert json.loads(figures.read_text())["model"]["cut_replies"] == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo-small", "--model", "x"), "--model x chooses a model of a server"),
        (("demo-small", "--report", "x"), "--report judges or stores a comparison; name the model to compare with"),
        (("demo-small", "--max-loss", "1"), "--max-loss judges or stores a comparison"),
        (("demo-small", "--against", "demo-small", "--max-tokens", "2048"), "the context of demo-small is 2048"),
    ],
)
def test_impossible_requests_are_refused(arguments: tuple[str, ...], message: str, files: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*arguments[:1], *files, *arguments[1:])


def test_other_models_need_tasks_and_text(tmp_path: Path) -> None:
    other = copy_of_small(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = dict(list(tokenizer["model"]["vocab"].items())[:-1])
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="other is none of the embedded models, so --tasks and --text must be given"):
        run(str(other), "--against", "demo-small")
