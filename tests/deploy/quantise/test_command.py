"""`troupe quantize` turns a model into one that is served, and says what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from raytroupe.cluster.errors import ConfigError
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.topology import ShardLayout, quantised_layer_bytes
from raytroupe.deploy.cli import cli
from raytroupe.deploy.model_folder import DEMO_MODELS


def test_embedded_model_is_quantised(tmp_path: Path) -> None:
    out = tmp_path / "small"
    command = ["quantize", DEMO_MODELS[1], str(out), "--method", "gptq", "--group-size", "64", "--samples", "24"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "gptq, 4 bits, groups of 64" in result.output
    assert f"troupe eval {out} --against {DEMO_MODELS[1]}" in result.output
    quantisation = load_spec(out).quantisation
    assert quantisation is not None
    assert quantisation.label == "int4 g64"
    ratio = float(result.output.partition("ratio ")[2].split()[0])
    spec = load_spec(Path(DEMO_MODELS[1]))
    saved = quantised_layer_bytes(load_spec(out), ShardLayout())
    blocks = (saved[1] - saved[0]) // (spec.num_layers * 16 * 2 * spec.num_kv_heads * spec.head_dim * 2)
    assert f"{blocks:,} more blocks, {16 * blocks:,} tokens" in result.output
    assert ratio == pytest.approx((4 + 16 / 64) / 16, abs=0.002), "a scale of 16 bits per group; shapes are noise"


def test_the_help_says_what_others_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = " ".join(CliRunner().invoke(cli, ["quantize", "--help"]).output.split())
    assert "transformers 5.23 neither --asymmetric nor mixtures of experts" in output


def test_unknown_values_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    runner = CliRunner()
    assert "rtn" in runner.invoke(cli, ["quantize", "nowhere", str(tmp_path), "--method", "magic"]).output
    for flags, message in ((["--bits", "5"], "--bits 5"), (["--activations", "fp8"], "--activations fp8")):
        with pytest.raises(ConfigError, match=message):
            runner.invoke(cli, ["quantize", "nowhere", str(tmp_path), *flags], catch_exceptions=False)
