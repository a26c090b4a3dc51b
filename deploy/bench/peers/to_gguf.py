"""Convert a Llama in Hugging Face format, of one safetensors file, to GGUF.

    python to_gguf.py MODEL OUT.gguf {bf16,q8_0,q4_0}

Runs under an interpreter that has gguf, torch and safetensors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

CONTROL_TOKEN, NORMAL_TOKEN = 3, 1
"""GGUF's types of vocabulary entries."""
TYPES = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def add_configuration(writer: Any, config: dict[str, Any], file_type: int) -> None:
    """Write the shape of the model."""
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(file_type)


def add_tokenizer(writer: Any, content: dict[str, Any], config: dict[str, Any]) -> None:
    """Write a byte-level BPE tokenizer."""
    bpe = content["model"]
    special = {entry["id"] for entry in content["added_tokens"] if entry["special"]}
    tokens = [token for token, _ in sorted(bpe["vocab"].items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL_TOKEN if index in special else NORMAL_TOKEN for index in range(len(tokens))])
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in bpe["merges"]]
    # llama.cpp refuses a vocabulary without merges; two special tokens are never merged in any text.
    writer.add_token_merges(merges or [" ".join(tokens[:2])])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def add_weights(writer: Any, weights: dict[str, Any], config: dict[str, Any], quantization: Any) -> None:
    """Write all matrices in `quantization` and all vectors in fp32."""
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    for name, weight in weights.items():
        weight = weight.float()
        if name in TOP:
            target = TOP[name]
        else:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            target = f"blk.{layer}.{LAYER[part]}.weight"
            if part in heads:
                weight = interleave(weight, heads[part])
        array = weight.numpy()
        if array.ndim == 1:
            writer.add_tensor(target, array.astype(np.float32))
        else:
            writer.add_tensor(target, gguf.quants.quantize(array, quantization), raw_dtype=quantization)


def interleave(weight: Any, heads: int) -> Any:
    """Reorder the rotary halves of every head to pairs, as GGUF's Llama expects them."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("type", choices=TYPES)
    given = parser.parse_args()
    quantization, file_type = TYPES[given.type]
    config = json.loads((given.model / "config.json").read_text())
    writer = gguf.GGUFWriter(given.target, "llama")
    add_configuration(writer, config, file_type)
    add_tokenizer(writer, json.loads((given.model / "tokenizer.json").read_text()), config)
    add_weights(writer, load_file(given.model / "model.safetensors"), config, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
