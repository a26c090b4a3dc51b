"""A model as data: all that the decoder, the loader and the planner need to know, from a checkpoint's config.json.

`load_spec` combines the numbers of the config with the family's row in `cluster/families.py`. Nothing downstream asks
for a model's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from .checkpoint_config import integer, mapping, number, optional_number, read_json, token_ids
from .errors import CheckpointError, UnsupportedModel
from .families import FAMILIES, Family, NormPlacement, QKNorm, TensorNaming
from .layer_spec import LayerSpec, parse_layers
from .quantisation import Quantisation
from .quantisation_config import load_quantisation
from .rope_spec import RopeSpec, parse_rope, rope_parameters, rope_parameters_of_layer_type

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Config spelling → name of the gated activation in kernels/activation.py."""

DTYPES = ("float32", "bfloat16", "float16")


class MoESpec(msgspec.Struct, frozen=True, kw_only=True):
    """The mixture of experts of a sparse layer."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    """Width of one expert."""
    normalize_weights: bool
    """Routing weights of a token's experts are scaled to sum to 1."""
    shared_intermediate_size: int = 0
    """Width of the shared expert; 0: none."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer. Sizes are those of the whole model; `cluster/topology.py` divides them."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    """Longest sequence in tokens."""
    dtype: str
    """The checkpoint's, one of `DTYPES`."""
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    norm_eps: float
    norm_placement: NormPlacement
    norm_offset: float
    qk_norm: QKNorm
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: str
    """Value of `ACTIVATIONS`."""
    attention_scale: float
    attention_softcap: float | None
    """Scores s become cap * tanh(s / cap)."""
    logits_softcap: float | None
    embedding_scale: float
    residual_scale: float
    """Multiplies what a layer's attention or MLP adds to the residual stream."""
    logits_scale: float
    """Multiplies the logits, before the soft cap."""
    naming: TensorNaming
    moe: MoESpec | None = None
    quantisation: Quantisation | None = None


def load_spec(folder: Path) -> ModelSpec:
    """Read `config.json` (and the end tokens of `generation_config.json`) of a model folder.

    Raises:
        CheckpointError: the folder or its config is missing, is not valid JSON, or lacks a field.
        UnsupportedModel: the architecture, rope type, activation or quantisation is not implemented.
    """
    config = read_json(folder, "config.json", required=True)
    name = architecture(config)
    family = FAMILIES[name]
    text = {**family.defaults, **config, **mapping(config, "text_config")}
    quantisation = load_quantisation(folder, text)
    if text.get("use_bidirectional_attention"):
        raise UnsupportedModel(f"{folder}/config.json: use_bidirectional_attention is not supported")
    eos = load_generation_defaults(folder).get("eos_token_id", token_ids(text, "eos_token_id"))
    try:
        spec = build_spec(text, name, family, eos)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}/config.json does not describe a {name}: {error!r}") from error
    return msgspec.structs.replace(spec, quantisation=quantisation)


def load_generation_defaults(folder: Path) -> dict[str, Any]:
    """Sampling defaults of `generation_config.json`; empty without that file.

    Keys, each only if set: `eos_token_id` (a tuple of ints), `temperature`, `top_p`, `top_k`, `repetition_penalty`
    (floats).

    Raises:
        CheckpointError: a value is of another type.
    """
    name = "generation_config.json"
    config, file = read_json(folder, name, required=False), str(folder / name)
    keys = ("temperature", "top_p", "top_k", "repetition_penalty")
    defaults: dict[str, Any] = {key: number(config, key, file=file) for key in keys if config.get(key) is not None}
    if config.get("eos_token_id") is not None:
        defaults["eos_token_id"] = token_ids(config, "eos_token_id", file=file)
    return defaults


def architecture(config: Mapping[str, Any]) -> str:
    """The entry of `FAMILIES` that a config asks for.

    Raises:
        UnsupportedModel: it asks for none of them.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise CheckpointError(f"config.json: architectures = {names!r}; a list is needed")
    for name in names:
        if name in FAMILIES:
            return name
    asked = " or ".join(map(repr, names)) or f"none (model_type {config.get('model_type')!r})"
    raise UnsupportedModel(f"config.json: architecture {asked} is not supported; known: {', '.join(FAMILIES)}")


def build_spec(config: Mapping[str, Any], name: str, family: Family, eos: tuple[int, ...]) -> ModelSpec:
    """Combine a config, whose gaps are filled with the family's defaults, with the family's constants."""
    hidden_size = integer(config, "hidden_size")
    num_heads = integer(config, "num_attention_heads")
    head_dim = integer(config, "head_dim", hidden_size // num_heads)
    num_kv_heads = integer(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads = {num_heads} is not a multiple of num_key_value_heads = {num_kv_heads}"
        )
    activation = str(config.get(family.activation_key))
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json: activation {activation!r} is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    max_position = integer(config, "max_position_embeddings")
    head_scale = number(config, "query_pre_attn_scalar", head_dim) ** -0.5
    return ModelSpec(
        architecture=name,
        hidden_size=hidden_size,
        num_layers=integer(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=integer(config, "intermediate_size"),
        vocab_size=integer(config, "vocab_size"),
        max_position_embeddings=max_position,
        dtype=_dtype(config),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=eos,
        layers=parse_layers(config, family),
        ropes=_ropes(config, family, head_dim, max_position),
        norm_eps=number(config, "rms_norm_eps"),
        norm_placement=family.norm_placement,
        norm_offset=family.norm_offset,
        qk_norm=family.qk_norm,
        qkv_bias=_flag(config, family.qkv_bias),
        output_bias=_flag(config, family.output_bias),
        mlp_bias=_flag(config, family.mlp_bias),
        activation=ACTIVATIONS[activation],
        attention_scale=number(config, "attention_multiplier", head_scale),
        attention_softcap=optional_number(config, "attn_logit_softcapping"),
        logits_softcap=optional_number(config, "final_logit_softcapping"),
        embedding_scale=hidden_size**0.5 if family.scaled_embedding else number(config, "embedding_multiplier", 1.0),
        residual_scale=number(config, "residual_multiplier", 1.0),
        logits_scale=1.0 / number(config, "logits_scaling", 1.0),
        naming=family.naming,
        moe=_moe(config, family),
    )


def _moe(config: Mapping[str, Any], family: Family) -> MoESpec | None:
    count = next((config[key] for key in family.num_experts_keys if config.get(key)), None)
    if count is None:
        if family.num_experts_keys:
            raise CheckpointError(f"config.json: {family.num_experts_keys[0]} is missing")
        return None
    return MoESpec(
        num_experts=count,
        experts_per_token=integer(config, "num_experts_per_tok"),
        intermediate_size=integer(config, family.moe_intermediate_key),
        normalize_weights=_flag(config, family.normalize_expert_weights),
        shared_intermediate_size=integer(config, "shared_expert_intermediate_size") if family.shared_expert else 0,
    )


def _ropes(config: Mapping[str, Any], family: Family, head_dim: int, max_position: int) -> tuple[RopeSpec, ...]:
    if family.local_rope_theta is None:
        parameters = [rope_parameters(config, family.rope_theta)]
    else:
        parameters = [
            rope_parameters_of_layer_type(config, "full_attention", family.rope_theta),
            rope_parameters_of_layer_type(config, "sliding_attention", family.local_rope_theta),
        ]
    return tuple(parse_rope(item, head_dim=head_dim, max_position=max_position) for item in parameters)


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModel(f"config.json: dtype {name!r} is not supported; known: {', '.join(DTYPES)}")
    return name


def _flag(config: Mapping[str, Any], value: bool | str) -> bool:
    return bool(config.get(value, False)) if isinstance(value, str) else value
