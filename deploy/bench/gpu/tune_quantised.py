"""Tuning of the products with quantised weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....kernels.gpu.eight_bit_linear import BLOCK_ROWS, EightBitProduct
from ....kernels.gpu.eight_bit_linear import candidates as eight_bit_candidates
from ....kernels.gpu.quantised_layout import Workspace, pack
from ....kernels.gpu.quantised_linear import MAX_ROWS, QuantisedConfig, QuantisedProduct, candidates
from ....kernels.gpu.triton_kernels import device_limits, multiplies_float8
from ....kernels.gpu.tuning import dtype_name
from ....kernels.quantised_weight import QuantisedWeight
from .engine_models import LLAMA_3_8B
from .quantised_points import library_product
from .random_weights import random_weight
from .timing import median_seconds, sets_beyond_cache
from .tune_linear import Product, crossover, products_of
from .tuning_search import NEVER, Task, Tuned, describe, entry_of, fastest, or_never

ROWS = (1, 2, 4, 8, 16, 32, MAX_ROWS)
TUNED_ROWS = (1, 16)
"""The fastest configuration is that with the least time for these together."""
TYPICAL = {16: 8, 32: 32, 64: 128, 128: 1024}
"""Rows of a tile → rows that stand for those it is used for."""
REPEATS = 7
DTYPE = torch.bfloat16


def quantised_tasks() -> list[Task]:
    """The products of a layer: 4 bits in groups of 128, 8 bits by row, and activations of 8 bits with both formats."""
    products = products_of(LLAMA_3_8B)[:-1]
    return [
        *(functools.partial(tune_quantised, product, bits) for bits in (4, 8) for product in products),
        *(
            functools.partial(tune_eight_bit, product, values, rows)
            for values in ("int8", "float8")
            for product in products
            for rows, _ in BLOCK_ROWS
        ),
    ]


def tune_quantised(product: Product, bits: int, device: torch.device, deadline: float) -> Tuned:
    """The fastest configuration where activations stay as they are, and up to how many rows it is faster than expanding
    the weight."""
    weights = _weights(product, device, {"bits": bits, "group_size": 128 if bits == 4 else 0})
    packed = [pack(weight) for weight in weights]
    workspace = Workspace(device, DTYPE)
    activation = "silu" if product.gated else None

    def seconds(rows: int, config: QuantisedConfig) -> float:
        made = [QuantisedProduct(weight, None, activation, workspace, config) for weight in packed]
        return _seconds(made, product, rows, device)

    found = candidates(product.outputs, product.inputs, gated=product.gated, processors=device_limits(device)[0])
    best = fastest(found, lambda config: sum(seconds(rows, config) for rows in TUNED_ROWS), deadline)
    ours = {rows: seconds(rows, best) for rows in ROWS}
    expanding = {rows: seconds(rows, dataclasses.replace(best, max_rows=0)) for rows in ROWS}
    best = dataclasses.replace(best, max_rows=crossover(ours, expanding))
    kernel = "quantised_gated_linear" if product.gated else "quantised_linear"
    library = _library_seconds(product, device, ROWS)
    text = f"{describe(best)}; ≤ {best.max_rows} rows"
    table = [
        _row(f"{kernel}, {bits} bits", product, rows, text, weights[0].nbytes, ours[rows], library[rows])
        for rows in ROWS
        if ours[rows] < NEVER
    ]
    return Tuned(kernel, entry_of({"dtype": dtype_name(DTYPE), "bits": bits}, _sizes(product), best), table)


def tune_eight_bit(product: Product, values: str, block_m: int, device: torch.device, deadline: float) -> Tuned:
    """The fastest configuration for tiles of so many rows, where activations have 8 bits too."""
    floats = values == "float8"
    kernel = "eight_bit_gated_linear" if product.gated else "eight_bit_linear"
    found = eight_bit_candidates(
        block_m, product.outputs, product.inputs, gated=product.gated, processors=device_limits(device)[0]
    )
    exact: dict[str, str | int] = {"values": values, "block_m": block_m}
    if floats and not multiplies_float8(device):
        return Tuned(kernel, entry_of(exact, _sizes(product), found[0]) | {"source": "reasoned"}, [])
    activations = torch.float8_e4m3fn if floats else torch.int8
    options = {"bits": 8, "group_size": 0, "floats": floats, "activations": activations}
    weights = _weights(product, device, options)
    rows = TYPICAL[block_m]

    def seconds(config: Any) -> float:
        activation = "silu" if product.gated else None
        made = [EightBitProduct(weight, None, activation, {block_m: config}) for weight in weights]
        return _seconds(made, product, rows, device)

    best = fastest(found, seconds, deadline)
    library = _library_seconds(product, device, (rows,))[rows]
    name = f"{kernel}, {values}, tiles of {block_m}"
    row = _row(name, product, rows, describe(best), weights[0].nbytes, seconds(best), library)
    return Tuned(kernel, entry_of(exact, _sizes(product), best), [row])


def _weights(product: Product, device: torch.device, options: dict[str, Any]) -> list[QuantisedWeight]:
    """As many as the device's cache cannot hold."""
    rows = product.outputs * (2 if product.gated else 1)
    size = rows * product.inputs * options["bits"] // 8
    return [random_weight(rows, product.inputs, device, **options) for _ in range(sets_beyond_cache(size, device))]


def _seconds(products: list[Any], product: Product, rows: int, device: torch.device) -> float:
    x = torch.randn(rows, product.inputs, dtype=DTYPE, device=device)
    out = x.new_empty(rows, product.outputs)
    calls: list[Callable[[], object]] = [functools.partial(made, x, out) for made in products]
    return or_never(lambda: median_seconds(calls, device, repeats=REPEATS).seconds)


def _library_seconds(product: Product, device: torch.device, all_rows: tuple[int, ...]) -> dict[int, float]:
    """Of the library's product in bfloat16."""
    shape = (product.outputs * (2 if product.gated else 1), product.inputs)
    count = sets_beyond_cache(shape[0] * shape[1] * DTYPE.itemsize, device)
    weights = [torch.randn(shape, dtype=DTYPE, device=device) for _ in range(count)]

    def seconds(x: Tensor) -> float:
        calls = [functools.partial(library_product, weight, product.gated, x) for weight in weights]
        return median_seconds(calls, device, repeats=REPEATS).seconds

    return {rows: seconds(torch.randn(rows, product.inputs, dtype=DTYPE, device=device)) for rows in all_rows}


def _sizes(product: Product) -> dict[str, int]:
    return {"outputs": product.outputs, "inputs": product.inputs}


def _row(
    kernel: str, product: Product, rows: int, config: str, size: int, ours: float, library: float
) -> dict[str, Any]:
    """Of the table."""
    return {
        "kernel": kernel, **_sizes(product), "rows": rows, "config": config, "library": library * 1e6,
        "ours": ours * 1e6, "bandwidth": size / ours / 1e9, "ratio": library / ours,
    }  # fmt: skip
