"""What sets one model family apart from another, as a table keyed by the config's `architectures` entry.

Everything numeric stands in a model's config.json. What does not is here: where the norms sit, which matrices have a
bias, how tensors are named, and the values that published configs leave out (the defaults of the family's class in
transformers).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import msgspec


class NormPlacement(enum.StrEnum):
    """Where a decoder layer normalises.

    PRE       x + f(norm(x))             Llama and most others
    POST      x + norm(f(x))             OLMo 2
    SANDWICH  x + norm(f(norm(x)))       Gemma 2 and 3
    """

    PRE = "pre"
    POST = "post"
    SANDWICH = "sandwich"


class QKNorm(enum.StrEnum):
    """Normalisation of queries and keys before rotation: none, each head on its own, or the full projection."""

    NONE = "none"
    HEAD = "head"
    FULL = "full"


class WindowPattern(enum.StrEnum):
    """Which layers slide where the config has no `layer_types`."""

    NEVER = "never"
    ALL = "all"
    """Every layer, if `sliding_window` is set."""
    ALL_IF_ENABLED = "all if enabled"
    """The same, if `use_sliding_window` too."""
    LAST_IF_ENABLED = "last if enabled"
    """Layers from `max_window_layers` on, if `use_sliding_window` (Qwen 2 and 3)."""
    EVEN_FIRST_IF_ENABLED = "even first if enabled"
    """Even layers below `max_window_layers`, if `use_sliding_window` (Qwen2-MoE)."""
    PERIODIC = "periodic"
    """All but every `sliding_window_pattern`-th layer (Gemma)."""

    @property
    def needs_flag(self) -> bool:
        """Nothing slides unless the config's `use_sliding_window` is true."""
        return self.value.endswith("if enabled")


class TensorNaming(msgspec.Struct, frozen=True, kw_only=True):
    """Tensor names in the checkpoint, below `{prefix}layers.{i}.`."""

    prefixes: tuple[str, ...] = ("model.",)
    """Possible prefixes of the decoder's tensors; the checkpoint has one of them."""
    heads: tuple[str, ...] = ("lm_head.weight",)
    """Possible names of the output projection."""
    fused_qkv: bool = False
    """`self_attn.qkv_proj` and `mlp.gate_up_proj` instead of separate matrices."""
    input_norm: str = "input_layernorm"
    attention_output_norm: str = "post_attention_layernorm"
    mlp_input_norm: str = "post_attention_layernorm"
    mlp_output_norm: str = "post_feedforward_layernorm"
    moe: str = "mlp"
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's gate, up and down matrices."""


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table. A bias is True, False or the config key that says so."""

    defaults: Mapping[str, Any] = {}
    """Values of keys that a config may leave out."""
    norm_placement: NormPlacement = NormPlacement.PRE
    norm_offset: float = 0.0
    """Added to every norm weight."""
    qk_norm: QKNorm = QKNorm.NONE
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    window_pattern: WindowPattern = WindowPattern.NEVER
    activation_key: str = "hidden_act"
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of the hidden size."""
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None
    """Base of the sliding layers' own rotary embedding, if they have one."""
    naming: TensorNaming = TensorNaming()
    num_experts_keys: tuple[str, ...] = ()
    """Config keys with the number of experts, for mixtures; the first that is set counts."""
    moe_intermediate_key: str = "moe_intermediate_size"
    normalize_expert_weights: bool | str = "norm_topk_prob"
    shared_expert: bool = False
    """A dense expert beside the routed ones, behind a sigmoid gate."""


_LLAMA = Family(
    defaults={"hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
)
_QWEN_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
}
_GEMMA_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA_NAMING = TensorNaming(mlp_input_norm="pre_feedforward_layernorm")
_GEMMA3 = Family(
    defaults={
        **_GEMMA_DEFAULTS,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
    },
    norm_placement=NormPlacement.SANDWICH,
    norm_offset=1.0,
    qk_norm=QKNorm.HEAD,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    window_pattern=WindowPattern.PERIODIC,
    activation_key="hidden_activation",
    scaled_embedding=True,
    rope_theta=1_000_000.0,
    local_rope_theta=10_000.0,
    naming=_GEMMA_NAMING,
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": Family(
        defaults={
            "hidden_act": "silu",
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "sliding_window": 4096,
        },
        window_pattern=WindowPattern.ALL,
    ),
    "Qwen2ForCausalLM": Family(defaults=_QWEN_DEFAULTS, qkv_bias=True, window_pattern=WindowPattern.LAST_IF_ENABLED),
    "Qwen3ForCausalLM": Family(
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        qk_norm=QKNorm.HEAD,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        window_pattern=WindowPattern.LAST_IF_ENABLED,
    ),
    "Gemma2ForCausalLM": Family(
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 256_000,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        norm_placement=NormPlacement.SANDWICH,
        norm_offset=1.0,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        window_pattern=WindowPattern.PERIODIC,
        activation_key="hidden_activation",
        scaled_embedding=True,
        naming=_GEMMA_NAMING,
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": msgspec.structs.replace(
        _GEMMA3,
        naming=msgspec.structs.replace(
            _GEMMA_NAMING,
            prefixes=("model.language_model.", "language_model.model."),
            heads=("lm_head.weight", "language_model.lm_head.weight"),
        ),
    ),
    "Phi3ForCausalLM": Family(
        defaults={"hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        window_pattern=WindowPattern.ALL,
        naming=TensorNaming(fused_qkv=True),
    ),
    "Olmo2ForCausalLM": Family(
        defaults={"hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        norm_placement=NormPlacement.POST,
        qk_norm=QKNorm.FULL,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "GraniteForCausalLM": msgspec.structs.replace(_LLAMA, defaults={**_LLAMA.defaults, "attention_multiplier": 1.0}),
    "MixtralForCausalLM": Family(
        defaults={
            "hidden_act": "silu",
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 2,
        },
        window_pattern=WindowPattern.ALL,
        rope_theta=1_000_000.0,
        naming=TensorNaming(moe="block_sparse_moe", experts=("w1", "w3", "w2")),
        num_experts_keys=("num_local_experts", "num_experts"),
        moe_intermediate_key="intermediate_size",
        normalize_expert_weights=True,
    ),
    "Qwen2MoeForCausalLM": Family(
        defaults={
            **_QWEN_DEFAULTS,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
        },
        qkv_bias="qkv_bias",
        window_pattern=WindowPattern.EVEN_FIRST_IF_ENABLED,
        num_experts_keys=("num_experts", "num_local_experts"),
        shared_expert=True,
    ),
    "Qwen3MoeForCausalLM": Family(
        defaults={**_QWEN_DEFAULTS, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        qk_norm=QKNorm.HEAD,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        window_pattern=WindowPattern.ALL_IF_ENABLED,
        num_experts_keys=("num_experts", "num_local_experts"),
    ),
}
