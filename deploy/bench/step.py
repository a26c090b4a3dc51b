"""Where the time of an engine step goes: in the model, or around it.

    python -m raytroupe.deploy.make_bench_model bench-models/llama-254m
    python -m raytroupe.deploy.bench.step bench-models/llama-254m

Requests of equal length run at once in one process, so that nearly every step is one token for each of them. *Model*
is the forward pass and sampling, as the shard reports them; *inputs* is the rest of the shard's work, from the plan to
tensors; *between steps* is what remains of the wall time, from the first request added to the last token out:
scheduling and hand-over, as far as the next plan was not made while a step ran.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ...actors.local_engine import LocalEngine
from ...cluster.request import SamplingParams
from ...cluster.step import StepResult
from .mixed_requests import mixed_requests
from .options import DTYPE, THREADS, Concurrency, Dtype, JsonFile, ModelFolder, Threads
from .report import Column, Report, publish, run_as_program

COLUMNS = [
    Column("part", "part"),
    Column("per_step_ms", "ms per step", ".3f"),
    Column("seconds", "seconds", ".2f"),
    Column("share", "share of the time", ".2%"),
]


def main(
    model: ModelFolder,
    concurrency: Concurrency = 32,
    prompt_len: Annotated[int, typer.Option(min=1, help="Prompt tokens of every request.")] = 64,
    output_len: Annotated[int, typer.Option(min=2, help="Generated tokens of every request.")] = 128,
    dtype: Dtype = DTYPE,
    threads: Threads = THREADS,
    json_file: JsonFile = None,
) -> None:
    """Measure the share of a step that is not the model's."""
    with LocalEngine(
        model,
        dtype=dtype,
        num_threads=threads,
        max_num_seqs=concurrency,
        max_num_batched_tokens=max(1024, concurrency),
        max_model_len=prompt_len + output_len,
        enable_prefix_caching=False,
    ) as engine:
        vocab_size = engine.shard.spec.vocab_size
        prompts = [r.prompt for r in mixed_requests(concurrency, vocab_size, prompt_len=(prompt_len, prompt_len))]
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=2))  # warms up
        results: list[StepResult] = []
        engine.observe = results.append
        start = time.perf_counter()
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=output_len))
        wall = time.perf_counter() - start
    in_model = sum(result.model_seconds for result in results)
    in_shard = sum(result.total_seconds for result in results)
    parts = {
        "model": in_model,
        "inputs": in_shard - in_model,
        "between steps": wall - in_shard,
        "outside the model": wall - in_model,
    }
    rows = [
        {"part": part, "per_step_ms": seconds / len(results) * 1e3, "seconds": seconds, "share": seconds / wall}
        for part, seconds in parts.items()
    ]
    settings = {
        "model": model.name,
        "concurrency": concurrency,
        "prompt_len": prompt_len,
        "output_len": output_len,
        "dtype": dtype,
        "threads": threads,
    }
    publish(Report("step", settings, COLUMNS, rows, {"steps": len(results), "seconds": wall}), json_file)


if __name__ == "__main__":
    run_as_program(main)
