"""The whole engine on a GPU, in this process, with random weights in the shapes of two published models.

Batch-1 decoding is compared with the memory limit: every token reads all weights but the embedding's, and the keys and
values of all tokens before it, at the bandwidth of a copy.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from ....actors.local_engine import LocalEngine
from ....cluster.model_spec import ModelSpec
from ....cluster.topology import ShardLayout, kv_bytes_per_block, weight_bytes
from ..engine_points import run_engine, run_point, timed
from ..mixed_requests import BenchRequest, mixed_requests, wanted_tokens
from ..peers.points import Point
from .ceilings import COPY, of_matrix_rate
from .engine_models import LLAMA_3_8B, QWEN3_0_6B, TINY_VOCABULARY, write_model
from .host_gaps import record
from .part import PartContext, Row, with_unit

DTYPE_BYTES = 2
DECODE_TARGET, PREFILL_TARGET, GAPS_TARGET, BATCHING_TARGET = 0.75, 0.50, 0.03, 10.0
MIXED_LENGTHS = (100, 1024)
"""Tokens of prompts and of answers, uniform."""
MIXED_REQUESTS = 256
MIXED_RATE = "mixed_rate"
"""Key of the mixed load's tokens/s."""
ONE_BY_ONE_SECONDS = 20.0
REPEATS = 3


def measure_llama(context: PartContext) -> None:
    """Latency, host gaps and prefill in the shape of Llama-3-8B."""
    tiny = context.tiny
    model = write_model(context.folder / "llama-3-8b", LLAMA_3_8B, tiny=tiny)
    single = Point(1, 8, 4) if tiny else Point(1, 128, 256)
    batch = Point(4, 8, 4) if tiny else Point(32, 128, 128)
    prompts = Point(2, 24, 1) if tiny else Point(4, 2000, 1)
    longest, repeats = (64, 1) if tiny else (2048, REPEATS)
    engine = start(context, model, max_num_seqs=batch.concurrency, max_model_len=longest)
    if engine is None:
        return
    with engine:
        spec = engine.shard.spec
        with context.guard("8B shape: warm-up"):
            for point in (batch._replace(output_len=4), single._replace(output_len=4), prompts):
                timed(engine, point, spec.vocab_size)
        with context.guard("8B shape: batch-1 decode"):
            speeds = [run_point(engine, single, spec.vocab_size).speeds(single) for _ in range(repeats)]
            rate = statistics.median(speed["decode_tok_s"] for speed in speeds)
            context.report(decode_row(context, "8B shape: batch-1 decode", rate, spec, single))
        what = f"8B shape: decode, {batch.concurrency} at once"
        with context.guard(what):
            rate = run_point(engine, batch, spec.vocab_size).speeds(batch)["decode_tok_s"]
            context.report(Row(what=what, value=rate, unit="tok/s"))
        with context.guard("8B shape: host gaps"):
            context.report(gaps_row(context, engine, batch))
        what = f"8B shape: prefill, {prompts.concurrency} × {prompts.prompt_len:,} tokens"
        with context.guard(what):
            seconds = statistics.median(timed(engine, prompts, spec.vocab_size)[0] for _ in range(repeats))
            flops = prompts.concurrency * prefill_flops(spec, prompts.prompt_len)
            context.report(of_matrix_rate(context, what, flops, seconds, PREFILL_TARGET))


def measure_qwen(context: PartContext) -> None:
    """The mixed load in the shape of Qwen3-0.6B: all requests at once, and one after the other."""
    tiny = context.tiny
    requests = mixed_load(tiny)
    model = write_model(context.folder / "qwen3-0.6b", QWEN3_0_6B, tiny=tiny)
    longest = max(len(request.prompt) + request.output_len for request in requests)
    engine = start(context, model, max_num_seqs=len(requests), max_model_len=longest)
    if engine is None:
        return
    with engine:
        with context.guard("0.6B shape: warm-up"):
            run_engine(engine, [BenchRequest(r.prompt, 4 + i % 4) for i, r in enumerate(requests)])
        what = f"0.6B shape: {len(requests)} mixed requests"
        at_once = None
        with context.guard(what):
            seconds = run_engine(engine, requests)
            at_once = wanted_tokens(requests) / seconds
            prompts = sum(len(request.prompt) for request in requests)
            context.report(
                Row(
                    what=what,
                    key=MIXED_RATE,
                    value=at_once,
                    unit="tok/s",
                    text=f"{with_unit(at_once, 'tok/s')} {with_unit(seconds, 's')}",
                    against=f"{prompts:,} in {wanted_tokens(requests):,} out",
                )
            )
        with context.guard("0.6B shape: one request at a time"):
            context.report(one_by_one(engine, requests, at_once, 0.1 if tiny else ONE_BY_ONE_SECONDS))


def mixed_load(tiny: bool) -> list[BenchRequest]:
    """The requests that both this engine and transformers answer."""
    if tiny:
        return mixed_requests(4, TINY_VOCABULARY, prompt_len=(3, 12), output_len=(3, 6))
    return mixed_requests(MIXED_REQUESTS, QWEN3_0_6B["vocab_size"], prompt_len=MIXED_LENGTHS, output_len=MIXED_LENGTHS)


def start(context: PartContext, model: Any, *, max_num_seqs: int, max_model_len: int) -> LocalEngine | None:
    """An engine over random weights; None, and a row that says why, if it does not start."""
    what = f"{model.name}: start, random weights"
    with context.guard(what):
        begin = time.perf_counter()
        cpu: dict[str, Any] = {"num_threads": 1} if context.device.type == "cpu" else {}
        engine = LocalEngine(
            model,
            dtype="bfloat16",
            device=context.device.type,
            load_format="dummy",
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(24, max_num_seqs) if context.tiny else 8192,
            max_model_len=max_model_len,
            enable_prefix_caching=False,
            **cpu,
        )
        size = weight_bytes(engine.shard.spec, ShardLayout(), DTYPE_BYTES)
        context.report(
            Row(what=what, value=time.perf_counter() - begin, unit="s", against=f"weights {with_unit(size, 'B')}")
        )
        return engine
    return None


def decode_row(context: PartContext, what: str, rate: float, spec: ModelSpec, point: Point) -> Row:
    """Tokens/s of one request against what the memory allows."""
    bandwidth = context.known(COPY)
    limit = None if bandwidth is None else bandwidth / bytes_per_token(spec, point.prompt_len + point.output_len // 2)
    return Row(
        what=what,
        value=rate,
        unit="tok/s",
        text=f"{with_unit(rate, 'tok/s')} {with_unit(1 / rate, 's')}",
        against="" if limit is None else f"memory limit {with_unit(limit, 'tok/s')}",
        ratio=None if limit is None else rate / limit,
        target=DECODE_TARGET,
    )


def bytes_per_token(spec: ModelSpec, context_tokens: int) -> int:
    """That one decode step of one request reads: every weight it multiplies with, and its keys and values."""
    layout = ShardLayout()
    looked_up = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size * DTYPE_BYTES
    per_token = kv_bytes_per_block(spec, layout, 1, DTYPE_BYTES)
    return weight_bytes(spec, layout, DTYPE_BYTES) - looked_up + context_tokens * per_token


def prefill_flops(spec: ModelSpec, tokens: int) -> int:
    """Floating-point operations for a prompt: two per weight of the layers and token, causal attention, one row of
    logits."""
    vocabulary = spec.vocab_size * spec.hidden_size
    tables = 1 if spec.tie_word_embeddings else 2
    of_layers = weight_bytes(spec, ShardLayout(), 1) - tables * vocabulary
    pairs = tokens * (tokens + 1) // 2
    attention = 4 * spec.num_heads * spec.head_dim * pairs * spec.num_layers
    return 2 * of_layers * tokens + attention + 2 * vocabulary


def gaps_row(context: PartContext, engine: LocalEngine, point: Point) -> Row:
    """The share of decoding in which the device waits for the host."""
    what = f"8B shape: host gaps, {point.concurrency} at once"
    if context.device.type != "cuda":
        return Row(what=what, text="not on a CPU", against="host and device are one")
    timeline = record(lambda: timed(engine, point, engine.shard.spec.vocab_size))
    share, all_pauses = timeline.gap_share, timeline.idle_us / timeline.span_us
    against = f"all pauses {all_pauses:.1%}"
    return Row(what=what, value=share, against=against, ratio=share, target=GAPS_TARGET, at_most=True)


def one_by_one(engine: LocalEngine, requests: list[BenchRequest], at_once: float | None, seconds: float) -> Row:
    """Tokens/s of the first requests, each alone, for about so many seconds; the ratio is that of all at once to it."""
    spent, tokens, count = 0.0, 0, 0
    for request in requests:
        spent += run_engine(engine, [request])
        tokens, count = tokens + request.output_len, count + 1
        if spent > seconds:
            break
    rate = tokens / spent
    return Row(
        what=f"0.6B shape: one at a time, first {count}",
        value=rate,
        unit="tok/s",
        against="all at once ÷ this",
        ratio=None if at_once is None else at_once / rate,
        target=BATCHING_TARGET,
    )
