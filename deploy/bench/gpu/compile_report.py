"""What the Triton kernels become on a GPU, found without one: registers, spills and shared memory of every kernel.

    python -m raytroupe.deploy.bench.gpu.compile_report
    python -m raytroupe.deploy.bench.gpu.compile_report --json kernels.json --capability 90

Triton brings NVIDIA's assembler along, so that this runs on any machine. It must not run under the interpreter
(`TRITON_INTERPRET`), which has nothing to compile.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Any

import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..options import JsonFile
from ..report import Column, Report, publish, run_as_program
from .compile_case import CompileCase
from .compile_cases import CASES

WARP = 32
COLUMNS = [
    Column("kernel", "kernel"),
    Column("label", "specialised for"),
    Column("capability", "sm"),
    Column("warps", "warps", "d"),
    Column("registers", "registers", "d"),
    Column("spilled", "spilled", "d"),
    Column("shared", "shared", ",d"),
    Column("tensor_cores", "tensor"),
]
_MATRIX_INSTRUCTIONS = (("wgmma", "wgmma"), ("mma.sync", "mma"))


def main(
    capability: Annotated[list[int] | None, typer.Option(help="Only these: 80, 90.")] = None,
    only: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    json_file: JsonFile = None,
) -> None:
    """Compile every case of `compile_cases.py` and print what the assembler says."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    jobs = [
        (index, wanted)
        for index, case in enumerate(CASES)
        for wanted in case.capabilities
        if only in case.name and (not capability or wanted in capability)
    ]
    rows = compile_all(jobs)
    publish(Report("gpu kernels", {"triton": triton.__version__}, COLUMNS, rows, {}), json_file)


def compile_all(jobs: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    """`compile_case` of (index among the cases, capability), on all cores."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_compile_job, jobs))


def _compile_job(job: tuple[int, int]) -> dict[str, Any]:
    index, capability = job
    return compile_case(CASES[index], capability)


def compile_case(case: CompileCase, capability: int) -> dict[str, Any]:
    """Compile for one compute capability; a row of the table.

    Raises:
        triton.CompilationError: the kernel cannot be compiled for it.
    """
    names = case.kernel.arg_names
    missing = [name for name in names if name not in case.types and name not in case.constants]
    assert not missing, f"{case.name}: no type for {missing}"
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if name not in case.constants and name not in case.unaligned and not signature[name].startswith("fp")
    }
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constants), attrs=aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, WARP),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    ptx = compiled.asm["ptx"]
    registers, spilled = resource_usage(compiled.asm["cubin"])
    return {
        "kernel": case.name,
        "label": case.label,
        "capability": str(capability),
        "warps": case.num_warps,
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
        "hot": case.hot,
        "tensor_cores": next((name for text, name in _MATRIX_INSTRUCTIONS if text in ptx), ""),
    }


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of stack per thread) of the only kernel in a binary.

    The kernels have no arrays that live on the stack by themselves: what is there was spilled.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert used is not None, text
    return int(used[1]), int(used[2])


if __name__ == "__main__":
    run_as_program(main)
