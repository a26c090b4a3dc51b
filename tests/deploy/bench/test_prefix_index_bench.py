"""The benchmark of the prefix index."""

from __future__ import annotations

import json
from pathlib import Path

from raytroupe.deploy.bench import prefix_index


def test_the_report_has_a_row_for_every_operation(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    prefix_index.main(blocks=10_000, replicas=4, repeats=100, json_file=path)
    report = json.loads(path.read_text())
    assert len(report["rows"]) == 2 * len(prefix_index.PROMPTS) + 2
    assert all(0 < row["median"] <= row["p99"] <= row["worst"] for row in report["rows"])
    assert 0 < report["notes"]["bytes_per_block"] < 1000
    assert report["notes"]["dropped"] == 0
