"""Troupe's engine in process, reported as a peer is. MODEL is a folder in Hugging Face format.

    python -m raytroupe.deploy.bench.peers.run_troupe MODEL --field dtype=bfloat16

Fields are those of `ModelConfig`.
"""

from __future__ import annotations

from typing import Any

from ....actors.local_engine import LocalEngine
from ..engine_points import WARM_UP, run_point, timed
from .points import MAX_BATCHED_TOKENS, MAX_NUM_SEQS, Reporter, parse_arguments

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
        timed(engine, WARM_UP, arguments.vocab_size)
        reporter = Reporter("troupe", arguments.model, fields["dtype"])
        for point in arguments.points:
            run = run_point(engine, point, arguments.vocab_size)
            reporter.report(point, run.total_s, run.prefill_s)


if __name__ == "__main__":
    main()
