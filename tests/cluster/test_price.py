"""Prices of tokens: the replica's time is paid for by the tokens that it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.price import (
    BYTES_PER_SECOND,
    TokenPrices,
    active_weights,
    estimated_curve,
    estimated_prices,
    token_prices,
)
from raytroupe.cluster.replica_report import StepCurve

DEMO = Path(__file__).resolve().parents[2] / "deploy/demo_models"


def test_tokens_pay_for_the_steps_that_compute_them() -> None:
    curve, seqs = StepCurve(base=0.01, prefill_token=1e-4, decode_row=2e-4), 16
    prices = token_prices(3.60, curve, seqs)
    assert prices == TokenPrices(prompt=pytest.approx(1e-7), output=pytest.approx(0.001 * (0.01 / 16 + 2e-4)))
    step = curve.seconds(prefill_tokens=100, decode_rows=seqs)
    assert prices.cost(100, seqs) == pytest.approx(3.60 / 3600 * step)


def test_an_estimate_grows_with_the_weights_and_says_that_it_is_one() -> None:
    large, small = (estimated_prices(load_spec(DEMO / name)) for name in ("demo-large", "demo-small"))
    assert large.estimated
    assert small.estimated
    assert 8 < large.output / small.output < 9  # as their weights
    assert large.output > large.prompt > 0


def test_active_weights_are_all_parameters_of_a_dense_model_but_norms() -> None:
    assert active_weights(load_spec(DEMO / "demo-large")) == pytest.approx(5_049_600, rel=1e-3)


def test_wider_numbers_cost_more_to_read_and_the_same_to_multiply() -> None:
    spec = load_spec(DEMO / "demo-large")
    narrow, wide = estimated_curve(spec, 2), estimated_curve(spec, 4)
    assert wide.base == pytest.approx(2 * narrow.base)
    assert wide.decode_row == narrow.decode_row
    assert narrow.base * BYTES_PER_SECOND == pytest.approx(2 * 5_049_600, rel=1e-3)


def test_of_a_mixture_a_token_meets_only_its_experts(tmp_path: Path) -> None:
    folder = make_tiny_model("mixtral", tmp_path)
    spec = load_spec(folder)
    assert spec.moe is not None
    read = estimated_curve(spec).base * BYTES_PER_SECOND / 2
    experts = spec.num_layers * spec.moe.num_experts * 3 * spec.hidden_size * spec.moe.intermediate_size
    unused = experts * (1 - spec.moe.experts_per_token / spec.moe.num_experts)
    assert active_weights(spec) == pytest.approx(read - unused)
