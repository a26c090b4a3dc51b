"""Troupe's engine in process, reported as a peer is. MODEL is a folder in Hugging Face format.

    python -m raytroupe.deploy.bench.peers.run_troupe MODEL --field dtype=bfloat16

Fields are those of `ModelConfig`.
"""

from __future__ import annotations

import time
from typing import Any

from ....actors.local_engine import LocalEngine
from ....cluster.request import SamplingParams
from .points import MAX_BATCHED_TOKENS, MAX_NUM_SEQS, Point, Reporter, parse_arguments, prompts

MAX_MODEL_LEN = 2048


def main() -> None:
    """Measure every point."""
    arguments = parse_arguments(__doc__)
    fields: dict[str, Any] = {
        "dtype": "bfloat16",
        "num_threads": arguments.threads,
        "max_num_seqs": max(MAX_NUM_SEQS, arguments.most),
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_model_len": max(MAX_MODEL_LEN, arguments.longest),
        "kv_cache_memory": "2GiB",
        "enable_prefix_caching": False,
        **arguments.fields,
    }
    with LocalEngine(arguments.model, **fields) as engine:

        def timed(point: Point) -> float:
            """Seconds from the call to the last token."""
            batch = prompts(point.concurrency, point.prompt_len, arguments.vocab_size)
            start = time.perf_counter()
            completions = engine.generate(batch, SamplingParams(temperature=0, max_tokens=point.output_len))
            elapsed = time.perf_counter() - start
            assert all(len(completion.tokens) == point.output_len for completion in completions), "stopped early"
            return elapsed

        timed(Point(2, 16, 2))
        reporter = Reporter("troupe", arguments.model, fields["dtype"])
        for point in arguments.points:
            reporter.report(point, timed(point), timed(point._replace(output_len=1)))


if __name__ == "__main__":
    main()
