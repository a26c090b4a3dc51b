"""The pages speak of files, commands and modules that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "deploy/demo_models/README.md",
    ROOT / "deploy/bench/peers/README.md",
]
MADE_ON_DEMAND = {".typecheck/raytroupe", "bench-models/", "bench-results/"}


def page_names(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_paths_in_code_spans_exist(page: Path) -> None:
    spans = re.findall(r"`([\w.-]+/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert [path for path in spans if path not in MADE_ON_DEMAND and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_modules_to_run_exist(page: Path) -> None:
    modules = re.findall(r"-m (raytroupe[\w.]+)", page.read_text(encoding="utf-8"))
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    mentioned = set(re.findall(r"(?:^    |`)make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    rules = {name for names in re.findall(r"^([\w -]+):", makefile, re.MULTILINE) for name in names.split()}
    assert mentioned <= rules


def test_structure_page_walks_through_files_of_every_floor() -> None:
    text = (ROOT / "docs/structure.md").read_text(encoding="utf-8")
    floors = {path.partition("/")[0] for path in re.findall(r"`(\w+/\w+\.py)`", text)}
    assert floors >= {"deploy", "router", "actors", "cluster", "kernels"}
