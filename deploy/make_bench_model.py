"""Write the model that the benchmarks run: the shape of a Llama with 254 million parameters and random weights.

    python -m raytroupe.deploy.make_bench_model bench-models/llama-254m

Speed depends on the shape and not on the values, so nothing has to be trained or downloaded. The tokenizer has one
token per byte and unused entries up to the size of the vocabulary: enough to serve text, and made in a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .bench.report import run_as_program

VOCAB_SIZE = 32_000
SPECIAL_TOKENS = ("<s>", "</s>", "<unk>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def bench_config() -> LlamaConfig:
    """Hidden size 1024, 16 layers, 16 heads of 64, 8 KV heads, MLP of 2816, untied embeddings of 32 000 tokens."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=2816,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, filled up to `vocab_size`."""
    entries = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    entries += [f"<unused{index}>" for index in range(vocab_size - len(entries))]
    tokenizer = Tokenizer(models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_model(folder: Path, seed: int = 0) -> int:
    """Write weights (bfloat16), configuration and tokenizer to `folder`; the number of parameters."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(bench_config()).bfloat16()
    # Without a file of generation defaults a server would sample at temperature 1; the benchmarks compare tokens.
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, do_sample=False)
    model.save_pretrained(folder)
    byte_tokenizer(VOCAB_SIZE).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write the benchmark model."""
    parameters = write_model(folder, seed)
    print(f"{folder}: {parameters:,} parameters")


if __name__ == "__main__":
    run_as_program(main)
