"""llama.cpp through its C API: batched decoding of independent sequences. MODEL is a GGUF file (`to_gguf.py`)."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from points import MAX_BATCHED_TOKENS, MAX_NUM_SEQS, Point, Reporter, batches, parse_arguments, prompts

UBATCH = 512


class Engine:
    """A model, a context of `sequences` independent sequences, and one batch that is filled again and again."""

    def __init__(self, path: str, sequences: int, longest: int, threads: int) -> None:
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx = sequences * -(-longest // 256) * 256
        params.n_batch, params.n_ubatch, params.n_seq_max = MAX_BATCHED_TOKENS, UBATCH, sequences
        params.n_threads = params.n_threads_batch = threads
        self._context = lib.llama_init_from_model(model, params)
        self._memory = lib.llama_get_memory(self._context)
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._batch = lib.llama_batch_init(MAX_BATCHED_TOKENS, 0, 1)

    def run(self, point: Point, vocab_size: int) -> tuple[float, float]:
        """Seconds in all, and seconds until the last first token."""
        lib.llama_memory_clear(self._memory, True)
        count, length, output = point
        batch_prompts, following = prompts(count, length, vocab_size), [0] * count
        start = time.perf_counter()
        for group in batches(count, MAX_BATCHED_TOKENS // length):
            self._decode([(t, p, s, p == length - 1) for s in group for p, t in enumerate(batch_prompts[s])])
            for place, sequence in enumerate(group):
                following[sequence] = self._greedy((place + 1) * length - 1)
        prefilled = time.perf_counter() - start
        for step in range(output - 1):
            self._decode([(following[s], length + step, s, True) for s in range(count)])
            following = [self._greedy(s) for s in range(count)]
        return time.perf_counter() - start, prefilled

    def _decode(self, items: list[tuple[int, int, int, bool]]) -> None:
        """Run one batch of (token, position, sequence, wants logits)."""
        batch = self._batch
        batch.n_tokens = len(items)
        for row, (token, position, sequence, wants_logits) in enumerate(items):
            batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, position, 1
            batch.seq_id[row][0], batch.logits[row] = sequence, wants_logits
        code = lib.llama_decode(self._context, batch)
        if code != 0:
            raise SystemExit(f"llama_decode returned {code}")

    def _greedy(self, row: int) -> int:
        logits = lib.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


@lib.llama_log_callback
def silent(level: int, text: bytes, user_data: Any) -> None:
    """llama.cpp logs to standard error otherwise."""


def main() -> None:
    """Measure every point."""
    arguments = parse_arguments(__doc__)
    if max(point.prompt_len for point in arguments.points) > MAX_BATCHED_TOKENS:
        raise SystemExit(f"prompts are computed whole here: --prompt may be at most {MAX_BATCHED_TOKENS}")
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    engine = Engine(arguments.model, max(MAX_NUM_SEQS, arguments.most), arguments.longest, arguments.threads)
    engine.run(Point(2, 16, 2), arguments.vocab_size)
    reporter = Reporter("llama.cpp", arguments.model, Path(arguments.model).stem.rpartition("-")[2])
    for point in arguments.points:
        reporter.report(point, *engine.run(point, arguments.vocab_size))


if __name__ == "__main__":
    main()
