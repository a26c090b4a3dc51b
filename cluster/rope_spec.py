"""Rotary position embedding as data: the `rope_scaling` / `rope_parameters` of a Hugging Face config, resolved.

Two spellings are read. transformers 4 writes `rope_theta`, `rope_scaling` and `partial_rotary_factor` at the top level;
transformers 5 writes them into `rope_parameters`, either flat or once per layer type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from .checkpoint_config import integer, mapping, number
from .errors import CheckpointError, UnsupportedModel

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One rotary embedding, which `actors/rope.py` turns into frequencies. Unused fields keep their defaults."""

    rope_type: str = "default"
    """One of `ROPE_TYPES`."""
    theta: float
    """Base of the geometric series of frequencies."""
    rotary_dim: int
    """Leading dimensions of a head that rotate; the others pass through."""
    original_max_position: int
    """Context length of the pre-training, which scaled types extend."""
    factor: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin, so that attention scores are scaled by its square (yarn, longrope)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: round the correction range to whole dimensions."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def rope_parameters(config: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """The rotary parameters of a model whose layers all rotate alike, in transformers 5's flat spelling.

    `theta` is the family's base, used where the config names none.
    """
    return _flatten(config, _scaling(config), config.get("rope_theta") or theta)


def rope_parameters_of_layer_type(config: Mapping[str, Any], layer_type: str, theta: float) -> dict[str, Any]:
    """The same for a model with one rotary embedding per layer type (Gemma 3).

    In transformers 4's spelling only full-attention layers are scaled; sliding ones have their own base.
    """
    scaling = _scaling(config)
    if isinstance(scaling.get(layer_type), Mapping):
        return _flatten(config, scaling[layer_type], theta)
    if layer_type == "sliding_attention":
        return _flatten(config, {}, config.get("rope_local_base_freq") or theta)
    return _flatten(config, scaling, config.get("rope_theta") or theta)


def _scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(config, "rope_parameters") or mapping(config, "rope_scaling")


def _flatten(config: Mapping[str, Any], given: Mapping[str, Any], theta: float) -> dict[str, Any]:
    parameters = {key: value for key, value in given.items() if value is not None and not isinstance(value, Mapping)}
    parameters["rope_type"] = parameters.get("rope_type") or parameters.get("type") or "default"
    if parameters["rope_type"] in ("su", "yarn") and "long_factor" in parameters:
        parameters["rope_type"] = "longrope"  # names that early Phi-3 configs used
    parameters.setdefault("rope_theta", theta)
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None:
            parameters[key] = config[key]
    return parameters


def parse_rope(parameters: Mapping[str, Any], *, head_dim: int, max_position: int) -> RopeSpec:
    """Resolve flat rotary parameters, with the same defaults as transformers' `modeling_rope_utils.py`.

    Raises:
        UnsupportedModel: the rope type is not one of `ROPE_TYPES`.
        CheckpointError: a parameter that the type needs is missing or has the wrong length.
    """
    rope_type = str(parameters["rope_type"])
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModel(f"config.json: rope type {rope_type!r} is not supported; known: {', '.join(ROPE_TYPES)}")
    rotary_dim = int(head_dim * number(parameters, "partial_rotary_factor", 1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(f"config.json: {rotary_dim} rotary dimensions per head; a positive even number is needed")
    original = integer(parameters, "original_max_position_embeddings", max_position)
    fields: dict[str, Any] = {}
    if rope_type in ("linear", "dynamic", "llama3"):
        fields["factor"] = number(parameters, "factor")
    if rope_type == "dynamic":
        original = max_position  # the formula is stated in terms of the configured context
    elif rope_type == "llama3":
        fields["low_freq_factor"] = number(parameters, "low_freq_factor")
        fields["high_freq_factor"] = number(parameters, "high_freq_factor")
    elif rope_type == "yarn":
        factor = number(parameters, "factor", max_position / original)
        fields["factor"] = factor
        fields["attention_factor"] = _yarn_attention_factor(parameters, factor)
        fields["beta_fast"] = number(parameters, "beta_fast", 32.0)
        fields["beta_slow"] = number(parameters, "beta_slow", 1.0)
        fields["truncate"] = bool(parameters.get("truncate", True))
    elif rope_type == "longrope":
        factor = number(parameters, "factor", max_position / original)
        fields["factor"] = factor
        fields["attention_factor"] = _longrope_attention_factor(parameters, factor, original)
        for key in ("short_factor", "long_factor"):
            fields[key] = _factors(parameters, key, rotary_dim // 2)
    return RopeSpec(
        rope_type=rope_type,
        theta=number(parameters, "rope_theta"),
        rotary_dim=rotary_dim,
        original_max_position=original,
        **fields,
    )


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """Temperature of YaRN (arXiv:2309.00071, section 3.4), with DeepSeek's `mscale` variants."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(float(parameters["mscale"])) / mscale(float(parameters["mscale_all_dim"]))
    return mscale(1.0)


def _longrope_attention_factor(parameters: Mapping[str, Any], factor: float, original: int) -> float:
    """Temperature of LongRoPE (arXiv:2402.13753)."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _factors(parameters: Mapping[str, Any], key: str, length: int) -> tuple[float, ...]:
    value = parameters.get(key)
    if not isinstance(value, list) or len(value) != length:
        found = f"{len(value)} of them" if isinstance(value, list) else repr(value)
        raise CheckpointError(f"config.json: rope type 'longrope' needs {length} numbers in {key!r}, found {found}")
    return tuple(float(item) for item in value)
