"""One matrix product with a weight in 16, 8 and 4 bits, from one row to hundreds.

    python -m raytroupe.deploy.bench.quantised_products

Products go round through so many weights that none is in a cache when its turn comes again, as in a model. The sides
take turns; bfloat16 is held as the decoder holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from ...cluster.errors import ConfigError
from ...kernels import native_library
from ...kernels.native_kernels import NativeKernels
from ...kernels.quantised_weight import QuantisedWeight, pack_nibbles
from .options import THREADS, JsonFile, Repeats, Threads
from .products import ROUND_BYTES, ROWS, measure
from .report import Column, Report, publish, run_as_program

COLUMNS = [
    Column("rows", "rows", "d"),
    Column("bfloat16", "bfloat16 µs", ".0f"),
    Column("w8a8", "W8A8 µs", ".0f"),
    Column("int8", "int8 µs", ".0f"),
    Column("int4", "int4 µs", ".0f"),
    Column("bandwidth", "int4 GB/s", ".1f"),
    Column("speed", "int4 GOP/s", ".0f"),
    Column("ratio8", "bfloat16 / int8", ".2f"),
    Column("ratio", "bfloat16 / int4", ".2f"),
]


def main(
    inputs: Annotated[int, typer.Option(min=1, help="Columns of the weight.")] = 2048,
    outputs: Annotated[int, typer.Option(min=1, help="Rows of the weight.")] = 5632,
    group_size: Annotated[int, typer.Option(min=8, help="Inputs that share a scale.")] = 128,
    threads: Threads = THREADS,
    repeats: Repeats = 5,
    json_file: JsonFile = None,
) -> None:
    """Measure products with few and with many rows."""
    if not native_library.is_built():
        raise ConfigError("the compiled kernels were not built; install the package with a C++ compiler")
    if inputs % group_size or group_size % 8:
        raise ConfigError(f"--group-size {group_size} must be a multiple of 8 that divides --inputs {inputs}")
    torch.set_num_threads(threads)
    count = max(1, ROUND_BYTES // (2 * inputs * outputs))
    sides = make_sides(inputs, outputs, group_size, count)
    rows = []
    for tokens in ROWS:
        times = measure(sides, torch.randn(tokens, inputs).bfloat16(), repeats)
        rows.append(
            {"rows": tokens}
            | {side: seconds * 1e6 for side, seconds in times.items()}
            | {
                "bandwidth": inputs * outputs * (4 + 16 / group_size) / 8 / times["int4"] / 1e9,
                "speed": 2 * tokens * inputs * outputs / times["int4"] / 1e9,
                "ratio8": times["bfloat16"] / times["int8"],
                "ratio": times["bfloat16"] / times["int4"],
            }
        )
    settings: dict[str, int | str] = {"inputs": inputs, "outputs": outputs, "group size": group_size}
    settings |= {"threads": threads, "repeats": repeats, "instructions": native_library.instruction_set()}
    publish(Report("quantised products", settings, COLUMNS, rows), json_file)


def make_sides(inputs: int, outputs: int, group_size: int, count: int) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """`count` products of random weights, in each form."""
    kernels = NativeKernels(torch.bfloat16)

    def integers(bits: int, size: int, activations: torch.dtype | None = None) -> QuantisedWeight:
        values = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
        scales = torch.rand(outputs, inputs // size).mul_(0.01).bfloat16()
        return QuantisedWeight(pack_nibbles(values) if bits == 4 else values, scales, None, bits, size, activations)

    return {
        "bfloat16": [kernels.linear(torch.randn(outputs, inputs).mul_(0.02).bfloat16()) for _ in range(count)],
        "w8a8": [kernels.linear(integers(8, inputs, torch.int8)) for _ in range(count)],
        "int8": [kernels.linear(integers(8, group_size)) for _ in range(count)],
        "int4": [kernels.linear(integers(4, group_size)) for _ in range(count)],
    }


if __name__ == "__main__":
    run_as_program(main)
