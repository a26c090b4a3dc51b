"""How much of the KV cache that requests hold is empty: the ends of their last blocks.

    python -m raytroupe.deploy.bench.kv_waste

A real run of an embedded model with more requests than run at once, so that some are always beginning and some ending.
After every step the slots in held blocks are compared with the tokens in them; the table has the totals over all steps.
*long* requests have mixed lengths from 256 tokens on; *short* ones have prompts of exactly 256 and end soon after,
which is the worst that sequences of 256 tokens and more can do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...actors.local_engine import LocalEngine
from ...cluster.request import SamplingParams
from ...cluster.step import StepResult
from ..model_folder import DEMO_MODELS
from .mixed_requests import mixed_requests
from .options import JsonFile, ModelFolder
from .report import Column, Report, publish, run_as_program

LOADS = {"long": ((256, 768), (16, 256)), "short": ((256, 256), (16, 32))}
"""Ranges of prompt and output lengths."""
COLUMNS = [
    Column("load", "load"),
    Column("prompt_len", "prompt tokens"),
    Column("output_len", "output tokens"),
    Column("steps", "steps", "d"),
    Column("held", "slots held, mean", ".0f"),
    Column("empty", "of them empty", ".1f"),
    Column("worst", "worst step", ".2%"),
    Column("waste", "waste", ".2%"),
]


def main(
    model: ModelFolder = Path(DEMO_MODELS[1]),
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 128,
    running: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 32,
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 16,
    json_file: JsonFile = None,
) -> None:
    """Measure the internal waste of the KV cache."""
    rows = [measure(load, model, requests, running, block_size) for load in LOADS]
    settings = {"model": model.name, "requests": requests, "running": running, "block_size": block_size}
    publish(Report("kv_waste", settings, COLUMNS, rows), json_file)


def measure(load: str, model: Path, requests: int, running: int, block_size: int) -> dict[str, Any]:
    """Run all requests of one load; a row of the table."""
    prompt_len, output_len = LOADS[load]
    held: list[int] = []
    empty: list[float] = []
    with LocalEngine(
        model, max_num_seqs=running, max_model_len=prompt_len[1] + output_len[1], block_size=block_size
    ) as engine:

        def look(_: StepResult) -> None:
            snapshot = engine.scheduler.snapshot()
            if snapshot.blocks_held:
                held.append(snapshot.blocks_held * block_size)
                empty.append(snapshot.internal_waste * held[-1])

        engine.observe = look
        vocab_size = engine.shard.spec.vocab_size
        workload = mixed_requests(requests, vocab_size, prompt_len=prompt_len, output_len=output_len)
        engine.generate(
            [request.prompt for request in workload],
            [SamplingParams(temperature=0, max_tokens=request.output_len) for request in workload],
        )
    return {
        "load": load,
        "prompt_len": f"{prompt_len[0]} – {prompt_len[1]}",
        "output_len": f"{output_len[0]} – {output_len[1]}",
        "steps": len(held),
        "held": sum(held) / len(held),
        "empty": sum(empty) / len(empty),
        "worst": max(of_step / slots for of_step, slots in zip(empty, held, strict=True)),
        "waste": sum(empty) / sum(held),
    }


if __name__ == "__main__":
    run_as_program(main)
