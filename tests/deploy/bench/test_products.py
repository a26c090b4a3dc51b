"""The sides of the products' benchmark multiply the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from raytroupe.deploy.bench.products import ROWS, main, make_sides, measure
from raytroupe.kernels import native_library

pytestmark = pytest.mark.skipif(not native_library.is_built(), reason="without compiled kernels there are no two sides")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_side_gives_the_product_and_is_timed(dtype: torch.dtype) -> None:
    weights = [torch.randn(70, 33).to(dtype) for _ in range(3)]
    sides = make_sides(dtype, weights)
    assert {"library", "plain"} <= set(sides)
    x = torch.randn(5, 33).to(dtype)
    for products in sides.values():
        for product, weight in zip(products, weights, strict=True):
            torch.testing.assert_close(product(x).double(), x.double() @ weight.double().T, rtol=0.01, atol=0.1)
    times = measure(sides, x, repeats=2)
    assert set(times) == set(sides)
    assert all(seconds > 0 for seconds in times.values())


def test_the_table_has_every_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytroupe.deploy.bench.products.ROUND_BYTES", 100_000)
    main(inputs=40, outputs=100, threads=1, repeats=1, json_file=tmp_path / "products.json")
    rows = json.loads((tmp_path / "products.json").read_text())["rows"]
    assert [(row["dtype"], row["rows"]) for row in rows] == [(d, n) for d in ("float32", "bfloat16") for n in ROWS]
    assert all(row["ratio"] == pytest.approx(row["library"] / row.get("compressed", row["plain"])) for row in rows)
