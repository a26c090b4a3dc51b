"""Models as config.json alone, in the shapes of published ones; `load_format = "dummy"` gives them random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON = {"hidden_act": "silu", "dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None}
LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    **_COMMON,
}
QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    **_COMMON,
}
TINY_VOCABULARY = 64
_TINY: dict[str, Any] = {
    "vocab_size": TINY_VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
"""Little enough for Triton's interpreter."""


def write_model(folder: Path, config: dict[str, Any], *, tiny: bool = False, **changes: Any) -> Path:
    """Write `config` with `changes`, of a tiny size if asked for, to a new folder; that folder."""
    folder.mkdir()
    content = {**config, **(_TINY if tiny else {}), **changes}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    return folder
