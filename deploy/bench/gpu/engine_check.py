"""The whole engine on this device: against transformers for every family, and under a load that leaves nothing out."""

from __future__ import annotations

import random
from typing import Any

from ....actors.local_engine import LocalEngine
from ....cluster.request import SamplingParams
from .engine_models import LLAMA_3_8B, write_model
from .family_references import LENGTHS, FamilyReference, make_reference
from .part import PartContext, Row
from .tiny_models import FAMILIES

NEW_TOKENS, TINY_NEW_TOKENS = 40, 4
TINY_LENGTHS, TINY_FAMILIES = (3, 20), ("llama", "qwen3_moe")
LOAD_REQUESTS, TINY_LOAD_REQUESTS = 96, 6
LOAD_SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 4000,
    "max_position_embeddings": 2048,
}


def check_families(context: PartContext) -> None:
    """Greedy tokens in float32, all prompts at once, equal to those that transformers gives each alone."""
    lengths, new_tokens = (TINY_LENGTHS, TINY_NEW_TOKENS) if context.tiny else (LENGTHS, NEW_TOKENS)
    for family in TINY_FAMILIES if context.tiny else FAMILIES:
        what = f"{family}, float32"
        with context.guard(what):
            reference = make_reference(
                family, context.folder, device=context.device, lengths=lengths, new_tokens=new_tokens
            )
            context.report(family_row(what, answers(context, reference, new_tokens), reference))


def answers(context: PartContext, reference: FamilyReference, new_tokens: int) -> list[list[int]]:
    """The engine's tokens for the reference's prompts."""
    longest = max(map(len, reference.prompts)) + new_tokens
    fields = engine_fields(
        context, max_model_len=longest, max_num_seqs=8, max_num_batched_tokens=24 if context.tiny else 64
    )
    with LocalEngine(reference.folder, dtype="float32", block_size=8, num_blocks=256, **fields) as engine:
        completions = engine.generate(reference.prompts, SamplingParams(temperature=0, max_tokens=new_tokens))
    return [completion.tokens for completion in completions]


def family_row(what: str, found: list[list[int]], reference: FamilyReference) -> Row:
    """The share of tokens that come before a difference, which must be all."""
    total = sum(map(len, reference.answers))
    equal, different = 0, []
    for index, (got, expected) in enumerate(zip(found, reference.answers, strict=True)):
        pairs = zip(got, expected, strict=False)
        until = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(got), len(expected)))
        equal += until
        if until < len(expected):
            different.append(f"prompt of {len(reference.prompts[index])} tokens differs at its token {until}")
    return Row(
        what=what,
        value=equal / total,
        text=f"{equal} of {total} tokens",
        against="transformers, greedy",
        ratio=equal / total,
        target=1.0,
        error="; ".join(different),
    )


def check_mixed_load(context: PartContext) -> None:
    """Requests of all kinds in bfloat16, with too few blocks for them: nobody's tokens are missing, and no block is
    held when all are done."""
    model = write_model(context.folder / "load", LLAMA_3_8B, tiny=context.tiny, **({} if context.tiny else LOAD_SHAPE))
    count = TINY_LOAD_REQUESTS if context.tiny else LOAD_REQUESTS
    longest, block_size = (32, 4) if context.tiny else (1024, 16)
    blocks = 2 + (1 if context.tiny else 6) * longest // block_size
    fields = engine_fields(
        context,
        max_model_len=longest,
        max_num_seqs=count // 2,
        max_num_batched_tokens=24 if context.tiny else 256,
        block_size=block_size,
    )
    what = f"mixed load, {count} requests, bfloat16"
    with (
        context.guard(what),
        LocalEngine(model, dtype="bfloat16", load_format="dummy", num_blocks=blocks, **fields) as engine,
    ):
        prompts, sampling = mixed_requests(count, longest, engine.shard.spec.vocab_size)
        completions = engine.generate(prompts, sampling)
        engine.scheduler.check_integrity()
        state = engine.scheduler.snapshot()
        short = sum(len(c.tokens) != s.max_tokens for c, s in zip(completions, sampling, strict=True))
        wrong = {
            f"{short} answers are too short": short,
            f"{state.blocks_held} blocks are still held": state.blocks_held,
            f"{state.running + state.waiting} requests are left": state.running + state.waiting,
            "nothing was preempted, so too little was tried": not state.preemptions,
        }
        tokens = sum(len(completion.tokens) for completion in completions)
        context.report(
            Row(
                what=what,
                text=f"{tokens:,} tokens",
                against=f"{state.preemptions} preemptions, {state.prefix_hits} hits",
                error="; ".join(text for text, found in wrong.items() if found),
            )
        )


def mixed_requests(count: int, longest: int, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of which a third begin alike, and every way of sampling."""
    numbers = random.Random(3)
    shared = [numbers.randrange(10, vocab_size) for _ in range(longest // 4)]
    prompts, sampling = [], []
    for index in range(count):
        own = [numbers.randrange(10, vocab_size) for _ in range(numbers.randint(1, longest // 4))]
        prompts.append([*shared, *own] if index % 3 == 0 else own)
        ways: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
            {"temperature": 1.2, "min_p": 0.05, "repetition_penalty": 1.1},
            {"temperature": 0.0, "logprobs": 3, "presence_penalty": 0.5, "logit_bias": {17: 2.0}},
        ]
        length = numbers.randint(longest // 8, longest // 3)
        sampling.append(SamplingParams(max_tokens=length, seed=index, **ways[index % len(ways)]))
    return prompts, sampling


def engine_fields(context: PartContext, **fields: Any) -> dict[str, Any]:
    """Fields of `ModelConfig` for this device."""
    device = context.device.type
    return {"device": device, **({"num_threads": 1} if device == "cpu" else {}), **fields}
