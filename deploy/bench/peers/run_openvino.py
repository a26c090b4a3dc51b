"""OpenVINO GenAI's continuous batching pipeline. MODEL is a folder that optimum-cli has converted."""

from __future__ import annotations

import time

import numpy as np
import openvino as ov
import openvino_genai as genai
from points import MAX_BATCHED_TOKENS, MAX_NUM_SEQS, Point, Reporter, parse_arguments, prompts

CACHE_GIB = 2


def main() -> None:
    """Measure every point."""
    arguments = parse_arguments(__doc__)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.max_num_seqs = max(MAX_NUM_SEQS, arguments.most)
    scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": arguments.threads}
    pipeline = genai.ContinuousBatchingPipeline(arguments.model, scheduler, "CPU", properties)

    def timed(point: Point) -> float:
        """Seconds from the call to the last token."""
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = point.output_len
        config.ignore_eos, config.do_sample = True, False
        batch = [
            ov.Tensor(np.array([ids], dtype=np.int64))
            for ids in prompts(point.concurrency, point.prompt_len, arguments.vocab_size)
        ]
        start = time.perf_counter()
        results = pipeline.generate(batch, [config] * point.concurrency)
        elapsed = time.perf_counter() - start
        assert all(len(result.m_generation_ids[0]) == point.output_len for result in results), "stopped early"
        return elapsed

    timed(Point(2, 16, 2))
    reporter = Reporter("openvino", arguments.model, arguments.fields.get("precision", "as converted"))
    for point in arguments.points:
        reporter.report(point, timed(point), timed(point._replace(output_len=1)))


if __name__ == "__main__":
    main()
