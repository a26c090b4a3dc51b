"""What a `quantization_config` of compressed-tensors says (compressed_tensors/quantization/quant_config.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .checkpoint_config import integer, mapping, strings, two_integers
from .errors import CheckpointError, UnsupportedModel
from .quantisation import Layout, Rule, Scheme

FORMATS = {
    "pack-quantized": Layout.PACKED,
    "int-quantized": Layout.PLAIN,
    "float-quantized": Layout.PLAIN,
    "naive-quantized": Layout.PLAIN,
}
_STRATEGIES = ("tensor", "channel", "group", "block")


def compressed_tensors_rules(fields: Mapping[str, Any]) -> Iterable[Rule]:
    """Ignored modules first; then targets by name, by expression, and "Linear" for all.

    What quantises the KV cache is left out: scales of ours are made anew for every head and token. So are static
    scales of activations: ours are per token.

    Raises:
        UnsupportedModel: names the format or option.
    """
    for key in ("sparsity_config", "transform_config"):
        option = mapping(fields, key)
        if option and option.get("format") != "dense" and option.get("config_groups") != {}:
            raise UnsupportedModel(f"quantization_config: {key} is not supported; use a checkpoint without it")
    groups = mapping(fields, "config_groups")
    if not groups:
        raise CheckpointError("quantization_config: config_groups is missing")
    for name in strings(fields, "ignore"):
        yield Rule(name, None)
    targets: list[tuple[tuple[int, str], Rule]] = []
    for name in groups:
        group = mapping(groups, name)
        scheme = _scheme(str(group.get("format") or fields.get("format")), group, name)
        for target in strings(group, "targets"):
            if target == "Embedding":
                raise UnsupportedModel(
                    "quantization_config: quantised embeddings (target 'Embedding') are not supported"
                )
            rank = 2 if target == "Linear" else 1 if target.startswith("re:") else 0
            targets.append(((rank, target), Rule("re:" if target == "Linear" else target, scheme)))
    for _, rule in sorted(targets, key=lambda item: item[0]):
        yield rule


def _scheme(written: str, group: Mapping[str, Any], name: str) -> Scheme:
    if written not in FORMATS:
        raise UnsupportedModel(
            f"quantization_config: compressed-tensors format {written!r} is not supported; known: {', '.join(FORMATS)}"
        )
    weights = mapping(group, "weights")
    if not weights or group.get("output_activations"):
        raise UnsupportedModel(
            f"quantization_config: config group {name!r} quantises something else than weights and the activations "
            f"that meet them, which is not supported"
        )
    is_float = weights.get("type", "int") == "float"
    bits = integer(weights, "num_bits", 8)
    symmetric = bool(weights.get("symmetric", True))
    layout = FORMATS[written]
    if not (bits == 8 if is_float else 2 <= bits <= 8) or (is_float and (layout is Layout.PACKED or not symmetric)):
        raise UnsupportedModel(
            f"quantization_config: {weights.get('type', 'int')} weights of {bits} bits"
            f"{'' if symmetric else ' with zero points'} as {written} are not supported; "
            f"known: int of 2 to 8 bits, symmetric float of 8 bits"
        )
    group_size, rows_per_scale = _sharing(weights)
    return Scheme(
        layout=layout,
        bits=bits,
        is_float=is_float,
        group_size=group_size,
        rows_per_scale=rows_per_scale,
        symmetric=symmetric,
        act_order=weights.get("actorder") in ("group", "dynamic", True),
        activations=_activations(mapping(group, "input_activations")),
    )


def _sharing(weights: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """How many inputs and how many outputs share a scale; None: all."""
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in _STRATEGIES:
        raise UnsupportedModel(
            f"quantization_config: weight strategy {strategy!r} is not supported; known: {', '.join(_STRATEGIES)}"
        )
    if strategy == "group":
        return integer(weights, "group_size"), 1
    if strategy == "block":
        rows, columns = two_integers(weights, "block_structure")
        return columns, rows
    return None, 1 if strategy == "channel" else None


def _activations(fields: Mapping[str, Any]) -> str | None:
    if not fields:
        return None
    kind, bits = fields.get("type", "int"), fields.get("num_bits", 8)
    if bits != 8 or kind not in ("int", "float"):
        raise UnsupportedModel(
            f"quantization_config: {kind} activations of {bits} bits are not supported; known: int and float of 8 bits"
        )
    return "int8" if kind == "int" else "fp8"
