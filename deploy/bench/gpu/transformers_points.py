"""The mixed load of `engine_points_gpu.py` through transformers: its own continuous batching, and static batches.

Both are ended after a fixed time, because the whole load can take minutes: what counts is tokens/s until then. For
continuous batching the time that is left out is its end, when fewer and fewer requests are under way, and for static
batches the end of a batch, when most of its rows are done already. So both figures flatter transformers, if anything.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ..mixed_requests import BenchRequest, wanted_tokens
from .engine_models import QWEN3_0_6B, write_model
from .engine_points_gpu import MIXED_RATE, mixed_load
from .part import PartContext, Row, with_unit
from .timing import free_memory, synchronize

CONTINUOUS_TARGET, STATIC_TARGET = 3.0, 10.0
CONTINUOUS_SECONDS = 55.0
STATIC_SECONDS = 40.0
RESERVE_SECONDS = 10.0
"""Left of the part's time when the last measurement ends."""
BATCH_SIZE = 64
PAD = 0
NO_END = -1
"""As an end-of-sequence token: answers run to their length."""


@dataclasses.dataclass(frozen=True)
class Share:
    """As much of the load as was answered in the time."""

    tokens: int
    """Generated, and asked for."""
    seconds: float
    requests: int
    """That were begun."""
    complete: bool
    attention: str
    """Name of the implementation; which one transformers takes depends on what is installed."""

    @property
    def rate(self) -> float:
        """Tokens/s."""
        return self.tokens / self.seconds


def measure(context: PartContext) -> None:
    """Both ways; each row's ratio is this engine's tokens/s on the whole load to transformers'."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    folder = write_model(context.folder / "qwen3-0.6b", QWEN3_0_6B, tiny=context.tiny)
    requests = mixed_load(context.tiny)
    model: Any = None
    with context.guard("transformers: random weights"):
        model = random_model(folder, context.device)
    if model is None:
        return
    with context.guard("transformers: continuous batching"):
        seconds = min(CONTINUOUS_SECONDS, context.seconds_left - RESERVE_SECONDS)
        share = continuous(model, requests, seconds, context.tiny)
        what = f"transformers, continuous, {share.attention}"
        context.report(comparison(context, what, share, CONTINUOUS_TARGET))
    free_memory(context.device)
    with context.guard("transformers: static batches"):
        model.set_attn_implementation("sdpa")
        seconds = min(STATIC_SECONDS, context.seconds_left - RESERVE_SECONDS)
        share = static_batches(model, requests, BATCH_SIZE, seconds)
        what = f"transformers, generate, batches of {min(BATCH_SIZE, len(requests))}"
        context.report(comparison(context, what, share, STATIC_TARGET))


def random_model(folder: Path, device: torch.device) -> Any:
    """The model of a config, with transformers' random weights in bfloat16, made on the device."""
    config = AutoConfig.from_pretrained(folder)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=PAD)
    return model


def comparison(context: PartContext, what: str, share: Share, target: float) -> Row:
    """One way against this engine."""
    own = context.known(MIXED_RATE)
    part = "" if share.complete else f", first {share.seconds:.0f} s"
    return Row(
        what=what,
        value=share.rate,
        unit="tok/s",
        text=f"{with_unit(share.rate, 'tok/s')} {with_unit(share.seconds, 's')}",
        against=f"{share.requests} requests{part}",
        ratio=None if own is None else own / share.rate,
        target=target,
    )


def continuous(model: Any, requests: list[BenchRequest], seconds: float, tiny: bool) -> Share:
    """transformers' continuous batching with its own choice of attention, batch and memory, all requests at once.

    Raises:
        RuntimeError: it has answered nothing.
    """
    manager = start_manager(model, requests, tiny)
    attention = str(model.config._attn_implementation)
    finished: list[Any] = []
    begin = time.perf_counter()
    try:
        for request in requests:
            manager.add_request(list(request.prompt), max_new_tokens=request.output_len, eos_token_id=NO_END)
        while len(finished) < len(requests) and time.perf_counter() - begin < seconds and manager.is_running():
            result = manager.get_result(timeout=0.2)
            if result is not None and result.is_finished():
                finished.append(result)
        synchronize(model.device)
        spent = time.perf_counter() - begin
        complete = len(finished) == len(requests)
        under_way = [] if complete else generated_so_far(manager)
    finally:
        stop_manager(manager)
    failures = [result.error for result in finished if result.error]
    if failures or (not finished and not under_way):
        raise RuntimeError(f"transformers' continuous batching failed: {failures[0] if failures else 'no answers'}")
    tokens = sum(len(result.generated_tokens) for result in finished) + sum(under_way)
    return Share(tokens, spent, len(finished) + len(under_way), complete, attention)


def start_manager(model: Any, requests: list[BenchRequest], tiny: bool) -> Any:
    """A running manager, warmed up. Names of options differ between versions of transformers; unknown ones are left
    out."""
    from transformers import ContinuousBatchingConfig

    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    size = "page_size" if "page_size" in known else "block_size"
    wanted: dict[str, Any] = {size: 16, "num_blocks": 32, "max_batch_tokens": 64} if tiny else {}
    options: dict[str, Any] = {
        "generation_config": GenerationConfig(do_sample=False, pad_token_id=PAD, eos_token_id=NO_END),
        "continuous_batching_config": ContinuousBatchingConfig(
            **{name: value for name, value in wanted.items() if name in known}
        ),
    }
    hints = workload_hints(requests)
    manager = model.init_continuous_batching(**options, **({} if hints is None else {"workload_hints": hints}))
    if hasattr(manager, "warmup"):
        manager.warmup()
    manager.start()
    return manager


def workload_hints(requests: list[BenchRequest]) -> Any:
    """What `generate_batch` would tell the manager; None where transformers does not know such hints."""
    try:
        from transformers.generation.continuous_batching.utils import WorkloadHints
    except ImportError:
        return None
    return WorkloadHints(
        max_prompt_length=max(len(request.prompt) for request in requests),
        max_generated_length=max(request.output_len for request in requests),
        num_requests=len(requests),
    )


def generated_so_far(manager: Any) -> list[int]:
    """Tokens that each request under way has."""
    states = dict(manager.batch_processor.scheduler.active_requests)
    return [len(state.generated_tokens) for state in states.values() if state.generated_tokens]


def stop_manager(manager: Any) -> None:
    """End the manager at once, whatever it is doing, and free its memory."""
    try:
        manager.stop(block=True, timeout=10, hard_stop=True)
    except TypeError:
        manager.stop(block=True, timeout=10)


@torch.inference_mode()
def static_batches(model: Any, requests: list[BenchRequest], batch_size: int, seconds: float) -> Share:
    """`generate` on one batch after the other, padded on the left, until the time is over.

    Raises:
        RuntimeError: there is no time.
    """
    tokens = begun = 0
    begin = time.perf_counter()
    for first in range(0, len(requests), batch_size):
        left = seconds - (time.perf_counter() - begin)
        if left <= 0:
            break
        batch = requests[first : first + batch_size]
        width = max(len(request.prompt) for request in batch)
        padding = [width - len(request.prompt) for request in batch]
        ids = torch.tensor([[PAD] * pad + r.prompt for pad, r in zip(padding, batch, strict=True)], device=model.device)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=model.device)
        longest = max(request.output_len for request in batch)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, max_time=left)
        steps = output.shape[1] - width
        tokens += sum(min(steps, request.output_len) for request in batch)
        begun += len(batch)
    synchronize(model.device)
    spent = time.perf_counter() - begin
    if not begun:
        raise RuntimeError("no time was left for transformers' static batches")
    return Share(tokens, spent, begun, tokens == wanted_tokens(requests), str(model.config._attn_implementation))
