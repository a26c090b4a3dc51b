"""Tiny random checkpoints of every supported family, written by transformers itself.

Sizes are odd on purpose: grouped queries, a head size that is not hidden size / heads, a prime vocabulary, layers whose
windows are shorter than the test prompts. Norm weights and biases are random too, and weights are large, so that a
wrong norm placement changes the logits and greedy tokens are unambiguous.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 131
WINDOW = 24

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.8,
    "short_factor": [1.0 + 0.1 * i for i in range(4)],
    "long_factor": [2.0 + 0.5 * i for i in range(4)],
    "attention_factor": 1.15,
    "original_max_position_embeddings": 512,
}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28}

# family → (class of the config, class of the model, what differs from _BASE)
_TABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 12}),
    "llama3": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"head_dim": 12, "sliding_window": WINDOW}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": WINDOW},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": WINDOW, "sliding_window_pattern": 3},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 512}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, "shared_expert_intermediate_size": 36, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_EXPERTS, "head_dim": 12, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
}

FAMILIES: tuple[str, ...] = tuple(_TABLE)


def make_tiny_model(family: str, folder: Path, **overrides: Any) -> Path:
    """Write a random fp32 model of `family` to `folder` (safetensors, v5 config) and return the folder.

    `overrides` replace config fields. The same arguments give the same weights.
    """
    config_class, model_class, fields = _TABLE[family]
    config = getattr(transformers, config_class)(**{**_BASE, **fields, **overrides})
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FAMILIES.index(family))
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at 0 or 1
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return folder


def load_reference(folder: Path, device: torch.device | None = None) -> Any:
    """The same model in transformers, fp32, with the eager attention and experts that define it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    sparse = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
    eager = {"experts_implementation": "eager"} if sparse else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **eager
    ).eval()
    return model if device is None else model.to(device)
