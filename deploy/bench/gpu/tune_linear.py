"""Tuning of products for few rows, and the number of rows from which the library's are the faster ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ....kernels.gpu.activation import gated_activation
from ....kernels.gpu.linear import MAX_ROWS, LinearConfig, TritonGatedLinear, TritonLinear, candidates
from ....kernels.gpu.tuning import dtype_name
from .engine_models import LLAMA_3_8B, QWEN3_0_6B
from .timing import median_seconds, sets_beyond_cache
from .tuning_search import NEVER, Task, Tuned, describe, entry_of, fastest, or_never

ROWS = (1, 2, 4, 8, 16, 32, MAX_ROWS)
TUNED_ROWS = (1, 16)
"""The fastest configuration is that with the least time for these together."""
REPEATS = 7
INTERPRETED_PROCESSORS = 4
"""Of a device that is none."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A weight."""

    outputs: int
    """Half the rows of a gated one."""
    inputs: int
    gated: bool = False
    dtype: torch.dtype = torch.bfloat16


def linear_tasks() -> list[Task]:
    """All products of a decode step of the models."""
    products = dict.fromkeys(product for model in (LLAMA_3_8B, QWEN3_0_6B) for product in products_of(model))
    return [functools.partial(tune_product, product) for product in products]


def products_of(model: Mapping[str, Any]) -> list[Product]:
    """Of a model's config.json."""
    hidden, intermediate = model["hidden_size"], model["intermediate_size"]
    heads, kv_heads, head_dim = (model[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    return [
        Product((heads + 2 * kv_heads) * head_dim, hidden),
        Product(hidden, heads * head_dim),
        Product(intermediate, hidden, gated=True),
        Product(hidden, intermediate),
        Product(model["vocab_size"], hidden),
    ]


def tune_product(product: Product, device: torch.device, deadline: float) -> Tuned:
    """The fastest configuration, and up to how many rows it should be used."""
    shape = (product.outputs * (2 if product.gated else 1), product.inputs)
    size = shape[0] * shape[1] * product.dtype.itemsize
    weights = [torch.randn(shape, dtype=product.dtype, device=device) for _ in range(sets_beyond_cache(size, device))]

    def seconds(rows: int, make: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> float:
        x = torch.randn(rows, product.inputs, dtype=product.dtype, device=device)
        calls = [functools.partial(make(weight), x) for weight in weights]
        return or_never(lambda: median_seconds(calls, device, repeats=REPEATS).seconds)

    def ours(config: LinearConfig) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
        if product.gated:
            return lambda weight: TritonGatedLinear(weight, None, "silu", config)
        return lambda weight: TritonLinear(weight, None, config)

    def library(weight: Tensor) -> Callable[[Tensor], Tensor]:
        if product.gated:
            return lambda x: gated_activation(functional.linear(x, weight), "silu")
        return lambda x: functional.linear(x, weight)

    on_gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else INTERPRETED_PROCESSORS
    best = fastest(
        candidates(product.outputs, product.inputs, product.dtype, gated=product.gated, processors=processors),
        lambda config: sum(seconds(rows, ours(config)) for rows in TUNED_ROWS),
        deadline,
    )
    our_times = {rows: seconds(rows, ours(best)) for rows in ROWS}
    library_times = {rows: seconds(rows, library) for rows in ROWS}
    best = dataclasses.replace(best, max_rows=crossover(our_times, library_times))
    kernel = "gated_linear" if product.gated else "linear"
    sizes = {"outputs": product.outputs, "inputs": product.inputs}
    table = [
        {
            "kernel": kernel, **sizes, "rows": rows, "config": f"{describe(best)}; ≤ {best.max_rows} rows",
            "library": library_times[rows] * 1e6, "ours": our_times[rows] * 1e6,
            "bandwidth": size / our_times[rows] / 1e9, "ratio": library_times[rows] / our_times[rows],
        }
        for rows in ROWS
        if our_times[rows] < NEVER
    ]  # fmt: skip
    return Tuned(kernel, entry_of({"dtype": dtype_name(product.dtype)}, sizes, best), table)


def crossover(ours: Mapping[int, float], library: Mapping[int, float]) -> int:
    """Up to how many rows ours should run, so that the times of all numbers of rows together are the least; 0: never.

    Args:
        ours, library: seconds by rows, for the same numbers of rows.
    """
    return min(
        (0, *sorted(ours)),
        key=lambda most: sum(ours[rows] if rows <= most else library[rows] for rows in ours),
    )
