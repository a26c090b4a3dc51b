"""One matrix product by the compiled kernel and by torch's library, from one row to hundreds.

    python -m raytroupe.deploy.bench.products

Where the library is the faster one it should be used; where that begins is the crossover. Products go round through so
many weights that none is in a cache when its turn comes again, as in a model. bfloat16 weights of the compiled kernel
are measured compressed, as they are held where the processor unpacks them fast, and plain. The sides take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from ...cluster.errors import ConfigError
from ...kernels import native_library
from ...kernels.native_kernels import NativeKernels
from ...kernels.program import spread_stride
from ...kernels.torch_kernels import TorchKernels
from .options import THREADS, JsonFile, Repeats, Threads
from .report import Column, Report, publish, run_as_program

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
ROUND_BYTES = 256 * 2**20
"""Weights of one round, as they would be without compression."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = [
    Column("dtype", "dtype"),
    Column("rows", "rows", "d"),
    Column("library", "library µs", ".0f"),
    Column("plain", "compiled µs, plain", ".0f"),
    Column("compressed", "compressed", ".0f"),
    Column("bandwidth", "plain weights GB/s", ".1f"),
    Column("speed", "GFLOP/s", ".0f"),
    Column("ratio", "library / compiled", ".2f"),
]


def main(
    inputs: Annotated[int, typer.Option(min=1, help="Columns of the weight.")] = 1024,
    outputs: Annotated[int, typer.Option(min=1, help="Rows of the weight.")] = 2816,
    threads: Threads = THREADS,
    repeats: Repeats = 5,
    json_file: JsonFile = None,
) -> None:
    """Measure products with few and with many rows."""
    if not native_library.is_built():
        raise ConfigError("the compiled kernels were not built; install the package with a C++ compiler")
    torch.set_num_threads(threads)
    rows = []
    for name, dtype in DTYPES.items():
        size = inputs * outputs * dtype.itemsize
        count = max(1, ROUND_BYTES // size)
        sides = make_sides(dtype, [torch.randn(outputs, inputs).mul_(0.02).to(dtype) for _ in range(count)])
        for tokens in ROWS:
            times = measure(sides, torch.randn(tokens, inputs).to(dtype), repeats)
            compiled = times["compressed" if "compressed" in times else "plain"]
            rows.append(
                {"dtype": name, "rows": tokens}
                | {side: seconds * 1e6 for side, seconds in times.items()}
                | {
                    "bandwidth": size / compiled / 1e9,
                    "speed": 2 * tokens * inputs * outputs / compiled / 1e9,
                    "ratio": times["library"] / compiled,
                }
            )
    settings: dict[str, int | str] = {"inputs": inputs, "outputs": outputs, "threads": threads, "repeats": repeats}
    settings |= {"instructions": native_library.instruction_set()}
    publish(Report("products", settings, COLUMNS, rows), json_file)


def make_sides(dtype: torch.dtype, weights: list[Tensor]) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """The same products by the library and by the compiled kernel in each form that it has here."""
    makers = {
        "library": TorchKernels(torch.device("cpu"), dtype).linear,
        "plain": NativeKernels(dtype, compress=False).linear,
    }
    if dtype == torch.bfloat16 and native_library.instruction_set() in native_library.UNPACKING_INSTRUCTION_SETS:
        makers["compressed"] = NativeKernels(dtype, compress=True).linear
    return {side: [make(weight.clone()) for weight in weights] for side, make in makers.items()}


def measure(sides: dict[str, list[Callable[[Tensor], Tensor]]], x: Tensor, repeats: int) -> dict[str, float]:
    """Seconds of one product of each side with x [rows, in]: medians over `repeats` rounds through all weights.

    Each side gets the rows as the decoder gives them to it: the library's together, the compiled product's apart.
    """
    apart = x.new_empty(len(x), spread_stride(x.shape[1], x.dtype))[:, : x.shape[1]].copy_(x)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, products in sides.items():
            given = x if side == "library" else apart
            start = time.perf_counter()
            for product in products:
                product(given)
            times[side].append((time.perf_counter() - start) / len(products))
    return {side: statistics.median(values) for side, values in times.items()}


if __name__ == "__main__":
    run_as_program(main)
