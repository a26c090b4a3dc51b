"""Continuous batching against static batches: the same mixed requests by Troupe and by transformers' `generate`.

    python -m raytroupe.deploy.make_bench_model bench-models/llama-254m
    python -m raytroupe.deploy.bench.static_batches bench-models/llama-254m

Both run in this process with the same threads and dtype, in turn. transformers pads the prompts of a batch on the left
and generates until the longest request of the batch has its tokens; only tokens that were asked for count. Troupe takes
all requests at once and lets each go when it is done.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from ...actors.local_engine import LocalEngine
from .engine_points import run_engine
from .mixed_requests import BenchRequest, mixed_requests, wanted_tokens
from .options import DTYPE, THREADS, Dtype, JsonFile, ModelFolder, Repeats, Requests, Threads
from .report import Column, Report, measure_in_turn, publish, run_as_program

PAD = 0
COLUMNS = [
    Column("side", "side"),
    Column("seconds", "seconds", ".2f"),
    Column("tokens_per_second", "wanted tokens/s", ".1f"),
    Column("ratio", "× transformers", ".2f"),
]


def main(
    model: ModelFolder,
    requests: Requests = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests in one batch of transformers.")] = 32,
    repeats: Repeats = 3,
    dtype: Dtype = DTYPE,
    threads: Threads = THREADS,
    json_file: JsonFile = None,
) -> None:
    """Measure Troupe and transformers on the same requests."""
    disable_progress_bar()
    torch.set_num_threads(threads)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    reference.generation_config.eos_token_id = None  # every request runs to its length
    workload = mixed_requests(requests, reference.config.vocab_size)
    longest = max(len(request.prompt) + request.output_len for request in workload)
    with LocalEngine(
        model,
        dtype=dtype,
        num_threads=threads,
        max_num_seqs=requests,
        max_num_batched_tokens=max(1024, requests),
        max_model_len=longest,
        enable_prefix_caching=False,
    ) as engine:
        warm_up = mixed_requests(2, reference.config.vocab_size, output_len=(4, 4), seed=1)
        run_static_batches(reference, warm_up, batch_size)
        run_engine(engine, warm_up)
        seconds = measure_in_turn(
            {
                "transformers": lambda: run_static_batches(reference, workload, batch_size),
                "troupe": lambda: run_engine(engine, workload),
            },
            repeats,
        )
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    tokens = wanted_tokens(workload)
    rows = [
        {
            "side": f"{side}, batches of {batch_size}" if side == "transformers" else side,
            "seconds": median,
            "tokens_per_second": tokens / median,
            "ratio": medians["transformers"] / median,
        }
        for side, median in medians.items()
    ]
    settings = {"model": model.name, "requests": requests, "dtype": dtype, "threads": threads, "repeats": repeats}
    publish(Report("static_batches", settings, COLUMNS, rows, {"seconds": seconds, "wanted_tokens": tokens}), json_file)


@torch.inference_mode()
def run_static_batches(model: Any, requests: list[BenchRequest], batch_size: int) -> float:
    """Seconds for all requests in batches, in the order in which they come."""
    start = time.perf_counter()
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        width = max(len(request.prompt) for request in batch)
        padded = torch.tensor([[PAD] * (width - len(request.prompt)) + request.prompt for request in batch])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in batch])
        longest = max(request.output_len for request in batch)
        generated = model.generate(
            padded, attention_mask=mask, do_sample=False, max_new_tokens=longest, pad_token_id=PAD
        )
        assert generated.shape == (len(batch), width + longest), "generate() stopped early"
    return time.perf_counter() - start


if __name__ == "__main__":
    run_as_program(main)
