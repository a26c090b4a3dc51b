"""`troupe eval MODEL --against BASE` on an embedded model and damaged copies of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from raytroupe.cluster.checkpoint_hash import hash_checkpoint
from raytroupe.cluster.errors import ConfigError
from raytroupe.cluster.evaluation_report import REPORT_FILE, Verdict, read_report
from raytroupe.deploy.cli import cli
from raytroupe.deploy.evaluation.command import EXIT_NOT_PASSED
from raytroupe.deploy.evaluation.held_out_text import embedded_text
from raytroupe.deploy.evaluation.items import embedded_items
from raytroupe.deploy.model_folder import DEMO_MODELS

TASKS = ("capital", "json_extraction")
LIMITS = ("--max-margin", "8")
"""For few questions."""


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
    items = [item for item in embedded_items(seed=5, per_task=50) if item.task in TASKS]
    (folder / "tasks.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, items)))
    text = [{"messages": sample.messages} for sample in embedded_text(seed=5, per_task=3)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, text)))
    return ("--tasks", str(folder / "tasks.jsonl"), "--text", str(folder / "text.jsonl"), "--max-tokens", "48")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["eval", *arguments], catch_exceptions=False)


def test_equal_copy_passes_and_the_report_lies_beside_it(tmp_path: Path, files: tuple[str, ...]) -> None:
    variant = copy_of_small(tmp_path / "same")
    result = run(str(variant), "--against", "demo-small", *files, *LIMITS)
    assert result.exit_code == 0, result.output
    assert f"verdict: pass ({variant / REPORT_FILE})" in result.output
    report = read_report(variant / REPORT_FILE)
    assert report is not None
    evaluation = report.evaluations["auto"]
    assert evaluation.verdict is Verdict.PASS
    assert evaluation.reasons == []
    assert evaluation.variant.content == hash_checkpoint(variant)
    assert evaluation.base.content == hash_checkpoint(Path(DEMO_MODELS[1]))
    assert list(evaluation.tasks) == list(TASKS)
    assert (evaluation.tasks["capital"].lost, evaluation.tasks["capital"].items) == (0, 50)
    assert evaluation.tasks["capital"].accuracy > 0.9
    assert evaluation.text.kl_divergence == 0
    assert evaluation.text.ratio == 1
    assert evaluation.variant.json_items == 50
    assert evaluation.variant.json_valid > 0
    assert set(evaluation.variant.tokens_per_second) == {"1", "32"}
    assert evaluation.variant.weight_bytes == evaluation.base.weight_bytes > 0


def test_damaged_copy_fails_with_reasons_and_replaces_the_report(tmp_path: Path, files: tuple[str, ...]) -> None:
    variant = copy_of_small(tmp_path / "damaged", scale=0.3)
    (variant / REPORT_FILE).write_text("not a report")
    figures = tmp_path / "figures.json"
    result = run(str(variant), "--against", "demo-small", *files, "--output", str(figures))
    assert result.exit_code == EXIT_NOT_PASSED
    assert "task capital lost" in result.output
    assert "perplexity rose by" in result.output
    report = read_report(variant / REPORT_FILE)
    assert report == read_report(figures)
    assert report is not None
    assert report.evaluations["auto"].verdict is Verdict.FAIL
    assert report.evaluations["auto"].text.top1_agreement < 1


def test_too_few_questions_are_undecided(tmp_path: Path, files: tuple[str, ...]) -> None:
    report = tmp_path / "elsewhere.json"
    result = run("demo-small", "--against", "demo-small", *files, "--report", str(report))
    assert result.exit_code == EXIT_NOT_PASSED
    assert "more items of task capital needed" in result.output
    assert f"verdict: undecided ({report})" in result.output
    assert not (Path(DEMO_MODELS[1]) / REPORT_FILE).exists()


def test_model_alone_is_measured_without_a_verdict(tmp_path: Path, files: tuple[str, ...]) -> None:
    figures = tmp_path / "figures.json"
    result = run("demo-small", *files, "--output", str(figures))
    assert result.exit_code == 0
    assert "verdict" not in result.output
    written = json.loads(figures.read_text())
    assert written["tasks"]["capital"]["items"] == 50
    assert 1 < written["text"]["perplexity"] < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo-small", "--model", "x"), "--model x chooses a model of a server"),
        (("demo-small", "--report", "x"), "name the model to compare with: --against BASE"),
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
