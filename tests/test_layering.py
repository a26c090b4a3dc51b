"""Who may import whom: the table of floors in docs/structure.md, enforced on every import statement of the package.

Imports are read from the source, so that those inside functions and under `TYPE_CHECKING` count as well. One test
also imports the modules for real and looks at what came along, because a permitted library may bring a forbidden one.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "raytroupe"
ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "deploy": {"router", "actors", "cluster", "kernels"},
    "router": {"cluster"},
    "actors": {"cluster", "kernels"},
    "cluster": set(),
    "kernels": set(),
}
FORBIDDEN_LIBRARIES = {"cluster": {"ray", "torch", "triton", "transformers"}}

IN_PROCESS_ENGINE = f"{PACKAGE}.actors.local_engine"
NOT_IN_PROCESS = {"ray", "zmq"}


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the package's floors: dotted name to file."""
    return {
        ".".join((PACKAGE, *path.relative_to(root).with_suffix("").parts)): path
        for floor in MAY_IMPORT
        for path in sorted((root / floor).rglob("*.py"))
    }


def imports_of(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that `source`, the text of `module`, imports.

    `from ..cluster import step` gives both `raytroupe.cluster` and `raytroupe.cluster.step`, as the text alone does
    not say which of the two is a module. A literal name given to `import_module` or `__import__` counts too.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def violations(source: str, module: str) -> list[str]:
    """The imports of `module` that its floor does not permit, each with the line and the reason."""
    floor = module.split(".")[1]
    found = {}
    for line, name in imports_of(source, module):
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if first == PACKAGE and target in MAY_IMPORT and target != floor and target not in MAY_IMPORT[floor]:
            found[line] = f"{module}:{line}: {floor}/ may not import {target}/"
        elif first in FORBIDDEN_LIBRARIES.get(floor, ()):
            found[line] = f"{module}:{line}: {floor}/ may not import {first}"
        elif first in MAY_IMPORT:
            found[line] = f"{module}:{line}: write a relative import instead of '{name}'"
    return list(found.values())


def reachable_libraries(start: str, modules: dict[str, Path]) -> dict[str, str]:
    """Top-level libraries that `start` imports, itself or through modules of the package: library to importer."""
    libraries: dict[str, str] = {}
    seen = {start}
    pending = [start]
    while pending:
        module = pending.pop()
        for _, name in imports_of(modules[module].read_text(), module):
            if name in modules and name not in seen:
                seen.add(name)
                pending.append(name)
            if not name.startswith(PACKAGE):
                libraries.setdefault(name.partition(".")[0], module)
    return libraries


def loaded_after_importing(modules: list[str]) -> set[str]:
    """Top-level modules that a fresh interpreter holds after importing `modules`."""
    program = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return {name.partition(".")[0] for name in output.stdout.split()}


MODULES = modules_of(ROOT)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_floor_may(module: str) -> None:
    assert violations(MODULES[module].read_text(), module) == []


def test_every_floor_has_modules() -> None:
    assert {name.split(".")[1] for name in MODULES} == set(MAY_IMPORT)


def test_source_folders_have_no_init_file() -> None:
    assert [path for floor in MAY_IMPORT for path in (ROOT / floor).rglob("__init__.py")] == []


def test_cluster_loads_without_ray_torch_or_transformers() -> None:
    cluster = [name for name in MODULES if name.startswith(f"{PACKAGE}.cluster.")]
    assert loaded_after_importing(cluster).isdisjoint(FORBIDDEN_LIBRARIES["cluster"])


def test_in_process_engine_reaches_neither_ray_nor_zmq() -> None:
    reached = reachable_libraries(IN_PROCESS_ENGINE, MODULES)
    assert "torch" in reached, "the walk must get as far as the decoder"
    assert {library: reached[library] for library in NOT_IN_PROCESS & reached.keys()} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("raytroupe.cluster.planted", "from ..actors.shard import Shard"),
        ("raytroupe.cluster.planted", "from .. import actors"),
        ("raytroupe.cluster.planted", "import raytroupe.kernels.sampling"),
        ("raytroupe.cluster.planted", "from raytroupe import router"),
        ("raytroupe.cluster.planted", "def late():\n    import torch.nn as nn"),
        ("raytroupe.cluster.planted", "from ray import serve"),
        ("raytroupe.cluster.planted", "import importlib\nimportlib.import_module('transformers')"),
        ("raytroupe.cluster.planted", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton"),
        ("raytroupe.kernels.planted", "from ..cluster.step import StepPlan"),
        ("raytroupe.router.planted", "from ..actors import channel"),
        ("raytroupe.actors.planted", "from ..deploy.app import build"),
        ("raytroupe.actors.planted", "from cluster.step import StepPlan"),
        ("raytroupe.deploy.demo_models.planted", "from cluster import step"),
    ],
)
def test_checker_finds_a_planted_violation(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("raytroupe.cluster.innocent", "from .step import StepPlan\nimport msgspec\nfrom .. import __version__"),
        (
            "raytroupe.actors.innocent",
            "import ray, torch, zmq\nfrom ..kernels import sampling\nfrom ..cluster import step",
        ),
        ("raytroupe.deploy.innocent", "from ..router.app import app\nimport raytroupe.actors.scheduler"),
        ("raytroupe.deploy.demo_models.innocent", "from ...cluster.step import StepPlan"),
        ("raytroupe.router.innocent", "name = 'ray'  # from ..actors import shard"),
    ],
)
def test_checker_permits_what_the_table_permits(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_walk_follows_imports_through_the_package(tmp_path: Path) -> None:
    for name, source in {
        "actors/local_engine.py": "from ..cluster import step\nfrom .executor import Executor",
        "actors/executor.py": "def connect():\n    import zmq.asyncio",
        "actors/elsewhere.py": "import ray",
        "cluster/step.py": "import msgspec",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    assert reachable_libraries(IN_PROCESS_ENGINE, modules_of(tmp_path)) == {
        "zmq": f"{PACKAGE}.actors.executor",
        "msgspec": f"{PACKAGE}.cluster.step",
    }
