"""transformers: static batches through `generate()`. MODEL is a folder in Hugging Face format."""

from __future__ import annotations

import time

import torch
from points import Point, Reporter, parse_arguments, prompts
from transformers import AutoModelForCausalLM


def main() -> None:
    """Measure every point."""
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def timed(point: Point) -> float:
        """Seconds from the call to the last token."""
        count, length, output = point
        batch = torch.tensor(prompts(count, length, arguments.vocab_size))
        start = time.perf_counter()
        model.generate(batch, max_new_tokens=output, min_new_tokens=output, do_sample=False, pad_token_id=0)
        return time.perf_counter() - start

    timed(Point(2, 16, 2))
    reporter = Reporter("transformers", arguments.model, "bfloat16")
    for point in arguments.points:
        reporter.report(point, timed(point), timed(point._replace(output_len=1)))


if __name__ == "__main__":
    main()
