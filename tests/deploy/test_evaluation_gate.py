"""`troupe serve` takes a variant only if the report beside its weights says that these passed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from raytroupe.actors.placement import Capacity
from raytroupe.cluster.checkpoint_hash import hash_checkpoint
from raytroupe.cluster.config import ModelConfig
from raytroupe.cluster.errors import CheckpointError, ConfigError
from raytroupe.cluster.evaluation_report import (
    REPORT_FILE,
    Evaluation,
    EvaluationReport,
    Limits,
    ModelFigures,
    TaskFigures,
    TextFigures,
    Verdict,
    read_report,
    write_report,
)
from raytroupe.cluster.model_spec import load_spec
from raytroupe.deploy import cli
from raytroupe.deploy.evaluation.command import store
from raytroupe.deploy.model_folder import DEMO_MODELS
from raytroupe.deploy.served_model import resolve_models

CAPACITY = Capacity(cpus=2, gpus=0)
QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
        }
    },
}


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    """A folder whose config says that it is quantised; nothing here reads the weights."""
    folder = tmp_path / "small-int4"
    shutil.copytree(DEMO_MODELS[1], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTISATION}))
    return folder


def figures(folder: Path, kv_cache_dtype: str = "auto") -> ModelFigures:
    quantisation = load_spec(folder).quantisation
    return ModelFigures(
        model=folder.name,
        content=hash_checkpoint(folder),
        quantisation=quantisation.label if quantisation is not None else None,
        kv_cache_dtype=kv_cache_dtype,
        device="cpu",
        dtype="bfloat16",
        weight_bytes=1,
        tokens_per_second={},
        json_items=0,
        json_valid=0,
        cut_replies=0,
    )


def evaluation(folder: Path, verdict: Verdict, kv_cache_dtype: str = "auto") -> Evaluation:
    """Of a variant of the smaller embedded model, against that."""
    text = TextFigures(
        sequences=100,
        tokens=1000,
        base_perplexity=2.0,
        perplexity=2.0,
        ratio=1.0,
        low=1.0,
        high=1.0,
        certain_ratio=1.0,
        kl_divergence=0.0,
        kl_low=0.0,
        kl_high=0.0,
        top1_agreement=1.0,
        verdict=Verdict.PASS,
    )
    total = TaskFigures(
        items=100,
        base_right=100,
        right=100,
        lost=0,
        gained=0,
        base_accuracy=1.0,
        accuracy=1.0,
        loss=0.0,
        low=-3.7,
        high=3.7,
        certain_loss=-8.0,
        verdict=Verdict.PASS,
    )
    reasons = [] if verdict is Verdict.PASS else ["task addition lost 9.0 points", "perplexity rose by 7.0%"]
    return Evaluation(
        verdict=verdict,
        reasons=reasons,
        limits=Limits(),
        variant=figures(folder, kv_cache_dtype),
        base=figures(Path(DEMO_MODELS[1])),
        tasks={},
        total=total,
        text=text,
        sources={},
        environment={},
    )


def resolve(folder: Path, **fields: Any) -> None:
    (model,) = resolve_models([ModelConfig(model=str(folder), **fields)], CAPACITY)
    assert model.settings.folder == folder


def test_variant_that_was_never_evaluated_is_refused_with_the_command_to_run(quantised: Path) -> None:
    with pytest.raises(ConfigError, match="never evaluated") as refused:
        resolve(quantised)
    assert "small-int4 is refused: its weights are quantised (int4 g64)" in str(refused.value)
    assert f"run `troupe eval {quantised} --against BASE`" in str(refused.value)
    assert "--allow-unevaluated" in str(refused.value)


def test_variant_that_passed_is_served(quantised: Path) -> None:
    store(quantised / REPORT_FILE, evaluation(quantised, Verdict.PASS))
    resolve(quantised)


@pytest.mark.parametrize(
    ("verdict", "message"), [(Verdict.FAIL, "it failed its evaluation"), (Verdict.UNDECIDED, "left undecided")]
)
def test_other_verdicts_are_refused_with_their_reasons(quantised: Path, verdict: Verdict, message: str) -> None:
    store(quantised / REPORT_FILE, evaluation(quantised, verdict))
    with pytest.raises(ConfigError, match=f"{message}.*: task addition lost 9.0 points; perplexity rose by 7.0%"):
        resolve(quantised)


def test_weights_that_changed_since_are_refused(quantised: Path) -> None:
    store(quantised / REPORT_FILE, evaluation(quantised, Verdict.PASS))
    weights = bytearray((quantised / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (quantised / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match="its files have changed since it was evaluated"):
        resolve(quantised)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
)
def test_settings_that_changed_since_are_refused(quantised: Path, name: str) -> None:
    store(quantised / REPORT_FILE, evaluation(quantised, Verdict.PASS))
    content = (quantised / name).read_text() if (quantised / name).exists() else "{}"
    (quantised / name).write_text(content + "\n")
    with pytest.raises(ConfigError, match=rf"changed since it was evaluated \({name}\); run `troupe eval"):
        resolve(quantised)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model"]
)
def test_settings_that_were_added_since_are_refused(quantised: Path, name: str) -> None:
    store(quantised / REPORT_FILE, evaluation(quantised, Verdict.PASS))
    (quantised / name).write_text("{}")
    with pytest.raises(ConfigError, match=rf"changed since it was evaluated \({name}\)"):
        resolve(quantised)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_quantisation_files_count(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(DEMO_MODELS[1], tmp_path / "small-int4"))
    (folder / name).write_text('{"bits": 4, "group_size": 64}')
    store(folder / REPORT_FILE, evaluation(folder, Verdict.PASS))
    resolve(folder)
    (folder / name).write_text('{"bits": 4, "group_size": 128}')
    with pytest.raises(ConfigError, match=rf"changed since it was evaluated \({name}\)"):
        resolve(folder)


def test_base_that_is_a_variant_itself_is_refused(quantised: Path) -> None:
    against_itself = msgspec.structs.replace(evaluation(quantised, Verdict.PASS), base=figures(quantised))
    store(quantised / REPORT_FILE, against_itself)
    with pytest.raises(ConfigError, match="it was only compared with small-int4, itself a variant; run `troupe eval"):
        resolve(quantised)


def test_evaluation_on_another_device_is_refused(quantised: Path) -> None:
    store(quantised / REPORT_FILE, evaluation(quantised, Verdict.PASS))
    gpu = Capacity(cpus=2, gpus=1)
    with pytest.raises(ConfigError, match=r"evaluated on cpu and is to be served on cuda; run `.* --device cuda`"):
        resolve_models([ModelConfig(model=str(quantised))], gpu)
    resolve_models([ModelConfig(model=str(quantised), device="cpu")], gpu)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (Limits(max_loss=50), r"--max-loss 50 \(default 1\)"),
        (Limits(max_margin=8, max_perplexity_increase=4), r"--max-margin 8 .*, --max-perplexity-increase 4 "),
    ],
)
def test_pass_by_laxer_limits_is_refused(quantised: Path, limits: Limits, named: str) -> None:
    lax = msgspec.structs.replace(evaluation(quantised, Verdict.PASS), limits=limits)
    store(quantised / REPORT_FILE, lax)
    with pytest.raises(ConfigError, match=f"laxer than the defaults: {named}"):
        resolve(quantised)


def test_pass_by_stricter_limits_is_one(quantised: Path) -> None:
    strict = Limits(max_loss=0.5, max_margin=2, max_perplexity_increase=1)
    store(quantised / REPORT_FILE, msgspec.structs.replace(evaluation(quantised, Verdict.PASS), limits=strict))
    resolve(quantised)


def test_copy_of_an_evaluated_variant_is_served(quantised: Path) -> None:
    store(quantised / REPORT_FILE, evaluation(quantised, Verdict.PASS))
    copied = Path(shutil.copytree(quantised, quantised.with_name("copied"), copy_function=shutil.copyfile))
    resolve(copied)


@pytest.mark.parametrize("fields", [{"allow_unevaluated": True}, {"load_format": "dummy"}])
def test_who_asks_for_it_gets_it(quantised: Path, fields: dict[str, Any]) -> None:
    resolve(quantised, **fields)


def test_model_as_it_was_trained_needs_no_report() -> None:
    resolve(Path(DEMO_MODELS[1]))


def test_damaged_report_is_refused(quantised: Path) -> None:
    (quantised / REPORT_FILE).write_text("{}}")
    with pytest.raises(ConfigError, match=r"troupe_eval\.json is no evaluation report"):
        resolve(quantised)


def test_command_line_refuses_before_anything_starts(quantised: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.cli(["serve", str(quantised)], standalone_mode=True)
    assert ended.value.code == cli.EXIT_REFUSED
    assert "never evaluated" in capfd.readouterr().err


def test_evaluations_of_other_caches_stay_and_those_of_other_weights_go(quantised: Path) -> None:
    file = quantised / REPORT_FILE
    store(file, evaluation(quantised, Verdict.PASS))
    store(file, evaluation(quantised, Verdict.FAIL, "int8"))
    report = read_report(file)
    assert report is not None
    assert {name: e.verdict for name, e in report.evaluations.items()} == {"auto": Verdict.PASS, "int8": Verdict.FAIL}
    (quantised / "model.safetensors").write_bytes(b"other")
    store(file, evaluation(quantised, Verdict.PASS, "fp8"))
    report = read_report(file)
    assert report is not None
    assert list(report.evaluations) == ["fp8"]


def test_report_of_another_format_or_place(tmp_path: Path) -> None:
    assert read_report(tmp_path / "none.json") is None
    write_report(tmp_path / "next.json", EvaluationReport(format=2))
    with pytest.raises(CheckpointError, match="has format 2, and 1 is known"):
        read_report(tmp_path / "next.json")
    with pytest.raises(CheckpointError, match="name a file in a folder that can be written"):
        write_report(tmp_path / "none" / "report.json", EvaluationReport())


def test_8_bit_cache_is_a_variant_of_any_model(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_MODELS[1], tmp_path / "small"))
    with pytest.raises(
        ConfigError, match="small is refused: kv_cache_dtype = int8, and it was never evaluated"
    ) as refused:
        resolve(folder, kv_cache_dtype="int8")
    assert f"`troupe eval {folder} --against {folder} --kv-cache-dtype int8`" in str(refused.value)
    store(folder / REPORT_FILE, evaluation(folder, Verdict.PASS, "int8"))
    resolve(folder, kv_cache_dtype="int8")
    resolve(folder)
    with pytest.raises(ConfigError, match="kv_cache_dtype = fp8, and it was never evaluated"):
        resolve(folder, kv_cache_dtype="fp8")
