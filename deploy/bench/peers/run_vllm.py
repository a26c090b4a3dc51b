"""vLLM's CPU build through its offline API. MODEL is a folder in Hugging Face format."""

from __future__ import annotations

import os
import time

from points import MAX_NUM_SEQS, Point, Reporter, parse_arguments, prompts

CACHE_GIB = 2
MAX_MODEL_LEN = 2048


def main() -> None:
    """Measure every point."""
    arguments = parse_arguments(__doc__)
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE=str(CACHE_GIB), VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1"
    )
    from vllm import LLM, SamplingParams  # reads the environment

    llm = LLM(
        arguments.model,
        dtype="bfloat16",
        max_model_len=max(MAX_MODEL_LEN, arguments.longest),
        enable_prefix_caching=False,
        max_num_seqs=max(MAX_NUM_SEQS, arguments.most),
    )

    def timed(point: Point) -> float:
        """Seconds from the call to the last token."""
        batch = [
            {"prompt_token_ids": ids} for ids in prompts(point.concurrency, point.prompt_len, arguments.vocab_size)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=point.output_len, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(batch, sampling, use_tqdm=False)
        return time.perf_counter() - start

    timed(Point(2, 16, 2))
    reporter = Reporter("vllm", arguments.model, "bfloat16")
    for point in arguments.points:
        reporter.report(point, timed(point), timed(point._replace(output_len=1)))


if __name__ == "__main__":
    main()
