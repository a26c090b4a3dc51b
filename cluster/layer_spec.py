"""What may differ from layer to layer: attention window, rotary embedding, dense or sparse MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from .checkpoint_config import integer
from .errors import UnsupportedModel
from .families import Family, WindowPattern


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder layer."""

    window: int | None = None
    """A query at position p sees keys at positions > p - window; None: all before it."""
    rope: int = 0
    """Index into `ModelSpec.ropes`."""
    sparse: bool = False
    """The MLP is the mixture of experts `ModelSpec.moe`."""


def parse_layers(config: Mapping[str, Any], family: Family) -> tuple[LayerSpec, ...]:
    """All layers of a model.

    Raises:
        UnsupportedModel: the config names a layer type other than full and sliding attention.
    """
    count = integer(config, "num_hidden_layers")
    sliding = _sliding(config, family, count)
    window = integer(config, "sliding_window") if any(sliding) else None
    dense = set(config.get("mlp_only_layers") or ())
    step = integer(config, "decoder_sparse_step", 1)
    return tuple(
        LayerSpec(
            window=window if sliding[i] else None,
            rope=1 if sliding[i] and family.local_rope_theta is not None else 0,
            sparse=bool(family.num_experts_keys) and i not in dense and (i + 1) % step == 0,
        )
        for i in range(count)
    )


def _sliding(config: Mapping[str, Any], family: Family, count: int) -> list[bool]:
    """For every layer, whether its attention is limited to `sliding_window`."""
    pattern = family.window_pattern
    enabled = bool(config.get("use_sliding_window")) or not pattern.needs_flag
    if pattern is WindowPattern.NEVER or not enabled or not config.get("sliding_window"):
        return [False] * count
    if pattern in (WindowPattern.ALL, WindowPattern.ALL_IF_ENABLED):
        return [True] * count
    if config.get("layer_types"):
        return [_is_sliding(config["layer_types"], i) for i in range(count)]
    if pattern is WindowPattern.PERIODIC:
        period = integer(config, "sliding_window_pattern")
        return [(i + 1) % period != 0 for i in range(count)]
    boundary = config.get("max_window_layers") or 0
    if pattern is WindowPattern.LAST_IF_ENABLED:
        return [i >= boundary for i in range(count)]
    return [i % 2 == 0 and i < boundary for i in range(count)]


def _is_sliding(types: list[str], index: int) -> bool:
    kind = types[index] if index < len(types) else "missing"
    if kind not in ("sliding_attention", "full_attention"):
        raise UnsupportedModel(
            f"config.json: layer_types[{index}] = {kind!r} is not supported; known: full_attention, sliding_attention"
        )
    return kind == "sliding_attention"
