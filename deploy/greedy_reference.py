"""Greedy replies by transformers in float32: what Troupe's answers are compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH_SIZE = 32


def chat_prompts(folder: Path, chats: Sequence[list[dict[str, str]]]) -> list[list[int]]:
    """The token ids of every chat, with the beginning of a reply."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return tokenizer(texts, add_special_tokens=False).input_ids


@torch.inference_mode()
def greedy_tokens(folder: Path, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """The tokens that follow every prompt, up to and with the first stop token of the model.

    Prompts of one length share a batch, so that none is padded: padding would change the order of sums.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stops = model.generation_config.eos_token_id
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    replies: list[list[int]] = [[] for _ in prompts]
    for length, indices in sorted(by_length.items()):
        for start in range(0, len(indices), BATCH_SIZE):
            group = indices[start : start + BATCH_SIZE]
            batch = torch.tensor([prompts[index] for index in group])
            outputs = model.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=max_tokens
            )
            for index, output in zip(group, outputs[:, length:].tolist(), strict=True):
                replies[index] = cut_after_stop(output, stops)
    return replies


def cut_after_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """`tokens` up to and with the first of `stops`; what follows is padding."""
    for index, token in enumerate(tokens):
        if token in stops:
            return tokens[: index + 1]
    return tokens
