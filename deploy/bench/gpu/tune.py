"""Find the fastest configurations of our kernels on this machine's GPU and write them to `kernels/gpu/tuning.json`.

    python -m raytroupe.deploy.bench.gpu.tune
    python -m raytroupe.deploy.bench.gpu.tune --experts --seconds 300 --output tuning.json

Attention with heads of 128 and 64, products with the weights of Llama-3-8B and Qwen3-0.6B, and with --experts the
grouped ones of Qwen3-30B-A3B and Mixtral-8x7B, with --quantised those of Llama-3-8B with weights of 4 and 8 bits. Time
is shared out evenly: what compiles slowly tries fewer configurations, the most promising first. The table says what
became of it: our kernel beside the library's product in bfloat16, for every number of rows that was measured.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ....cluster.errors import ConfigError
from ....kernels.gpu import tuning
from ..options import JsonFile
from ..report import Column, Report, publish, run_as_program
from .tune_attention import attention_tasks
from .tune_experts import expert_tasks
from .tune_linear import linear_tasks
from .tune_quantised import quantised_tasks
from .tuning_search import run_all

COLUMNS = [
    Column("kernel", "kernel"),
    Column("outputs", "outputs", ",d"),
    Column("inputs", "inputs", ",d"),
    Column("rows", "rows", ",d"),
    Column("config", "configuration"),
    Column("library", "library µs", ".1f"),
    Column("ours", "ours µs", ".1f"),
    Column("bandwidth", "GB/s of weights", ",.0f"),
    Column("ratio", "library / ours", ".2f"),
]


def main(
    experts: Annotated[bool, typer.Option(help="Also the grouped products of mixtures of experts.")] = False,
    quantised: Annotated[bool, typer.Option(help="Also the products with quantised weights.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="How long to try configurations.")] = 100,
    output: Annotated[Path, typer.Option(help="The file whose entries for this kind of GPU to replace.")] = tuning.FILE,
    json_file: JsonFile = None,
) -> None:
    """Time configurations on the GPU and write the fastest."""
    if not torch.cuda.is_available():
        raise ConfigError("there is no GPU here; kernels are tuned on the kind of GPU that they are to run on")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    tasks = attention_tasks() + linear_tasks() + (expert_tasks() if experts else [])
    tasks += quantised_tasks() if quantised else []
    content = tuning.read(output if output.exists() else tuning.FILE)
    rows: list[dict[str, Any]] = []
    for tuned in run_all(tasks, device, time.monotonic() + seconds):
        tuning.replace(content, tuning.kind_of(name), tuned.kernel, tuned.entry)
        tuning.write(content, output)  # after every one, so that an interruption keeps what is known
        rows += tuned.rows
    publish(Report("gpu tuning", {"device": name, "seconds": seconds}, COLUMNS, rows), json_file)


if __name__ == "__main__":
    run_as_program(main)
