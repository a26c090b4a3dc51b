"""From a checkpoint's `quantization_config` to `Quantisation`: what each method writes, and what is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from .checkpoint_config import integer, mapping, read_json, strings, two_integers
from .compressed_tensors_config import compressed_tensors_rules
from .errors import CheckpointError, UnsupportedModel
from .quantisation import Layout, Quantisation, Rule, Scheme

_HEAD = Rule(r"re:(.*\.)?lm_head\Z", None)
_GPTQ_BITS = (2, 3, 4, 8)
_GPTQ_LAYOUTS = {"gptq": Layout.GPTQ, "gptq_v2": Layout.GPTQ_V2}


def load_quantisation(folder: Path, config: Mapping[str, Any]) -> Quantisation | None:
    """How a model folder is quantised; None: it is not.

    Args:
        config: of the decoder. Without a `quantization_config` in it, the separate files count that older GPTQ and AWQ
            tools wrote.

    Raises:
        UnsupportedModel: names the method, format or option that is not implemented, and what is.
        CheckpointError: a value is impossible.
    """
    file, fields = "config.json", mapping(config, "quantization_config") or mapping(config, "compression_config")
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if not fields and (folder / name).is_file():
            file, fields = name, {"quant_method": method, **read_json(folder, name, required=True)}
    if not fields:
        return None
    try:
        return parse_quantisation(fields)
    except CheckpointError as error:
        raise type(error)(f"{folder}/{file}: {str(error).removeprefix('config.json: ')}") from None
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{folder}/{file}: quantization_config is not understood: {error!r}") from error


def parse_quantisation(fields: Mapping[str, Any]) -> Quantisation:
    """See `load_quantisation`.

    Raises:
        UnsupportedModel: as there.
    """
    method = str(fields.get("quant_method") or ("compressed-tensors" if "config_groups" in fields else "missing"))
    if method not in _METHODS:
        raise UnsupportedModel(
            f"quantization_config: quant_method {method!r} is not supported; known: {', '.join(_METHODS)}"
        )
    rules = tuple(_METHODS[method](fields))
    for rule in rules:
        if rule.target.startswith("re:"):
            re.compile(rule.target.removeprefix("re:"))
    return Quantisation(method, rules)


def _gptq(fields: Mapping[str, Any]) -> Iterable[Rule]:
    """Written by GPTQModel, AutoGPTQ and optimum: gptqmodel/quantization/config.py."""
    written = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    if fields.get("is_marlin_format"):
        written = "marlin"
    if written not in _GPTQ_LAYOUTS:
        raise UnsupportedModel(
            f"quantization_config: GPTQ checkpoint_format {written!r} is not supported; "
            f"known: {', '.join(_GPTQ_LAYOUTS)}"
        )
    if fields.get("pack_dtype", "int32") != "int32":
        raise UnsupportedModel(
            f"quantization_config: pack_dtype {fields['pack_dtype']!r} is not supported; known: int32"
        )
    scheme = Scheme(
        layout=_GPTQ_LAYOUTS[written],
        bits=_one_of(fields, "bits", _GPTQ_BITS, "GPTQ"),
        group_size=_group_size(fields, "group_size"),
        symmetric=bool(fields.get("sym", True)),
        act_order=bool(fields.get("desc_act", False)),
    )
    for pattern, changes in mapping(fields, "dynamic").items():
        # "-:" leaves modules as they are, "+:" or nothing changes some fields for them.
        target = f"re:{re.sub(r'^[+-]:', '', pattern)}"
        if pattern.startswith("-:"):
            yield Rule(target, None)
            continue
        changed = {**fields, **changes}
        yield Rule(
            target,
            msgspec.structs.replace(
                scheme,
                bits=_one_of(changed, "bits", _GPTQ_BITS, "GPTQ"),
                group_size=_group_size(changed, "group_size"),
                symmetric=bool(changed.get("sym", True)),
                act_order=bool(changed.get("desc_act", False)),
            ),
        )
    if not fields.get("lm_head"):
        yield _HEAD
    if fields.get("modules_in_block_to_quantize"):
        if isinstance(fields["modules_in_block_to_quantize"], str):
            strings(fields, "modules_in_block_to_quantize")
        for group in fields["modules_in_block_to_quantize"]:
            for name in [group] if isinstance(group, str) else group:
                yield Rule(rf"re:.*\.{re.escape(name)}\Z", scheme)
        return
    yield Rule("re:", scheme)


def _awq(fields: Mapping[str, Any]) -> Iterable[Rule]:
    """Written by AutoAWQ: awq/models/_config.py. A module is left out whose name contains one of the given."""
    version = str(fields.get("version") or fields.get("format") or "gemm").lower()
    if version != "gemm":
        raise UnsupportedModel(f"quantization_config: AWQ version {version!r} is not supported; known: gemm")
    key = "bits" if fields.get("bits") is not None else "w_bit"
    scheme = Scheme(
        layout=Layout.AWQ,
        bits=_one_of(fields, key, (4,), "AWQ"),
        group_size=_group_size(fields, "group_size" if fields.get("group_size") is not None else "q_group_size"),
        symmetric=not fields.get("zero_point", True),
    )
    for name in strings(fields, "modules_to_not_convert"):
        yield Rule(f"re:.*{re.escape(name)}", None)
    yield _HEAD
    yield Rule("re:", scheme)


def _fp8(fields: Mapping[str, Any]) -> Iterable[Rule]:
    """Written by transformers (`FineGrainedFP8Config`) and by tools for vLLM.

    A module is left out that a given expression matches up to a dot, or whose name ends like it (transformers,
    `should_convert_module`).
    """
    if fields.get("expert_dtype", "fp8") != "fp8":
        raise UnsupportedModel(
            f"quantization_config: expert_dtype {fields['expert_dtype']!r} is not supported; known: fp8"
        )
    whole = fields.get("weight_block_size") is None
    rows, columns = (None, None) if whole else two_integers(fields, "weight_block_size")
    for name in strings(fields, "modules_to_not_convert") or strings(fields, "ignored_layers"):
        yield Rule(rf"re:(?:{name})(?:(?<=\.)|(?=\.|$))", None)
        yield Rule(rf"re:.*{re.escape(name)}\Z", None)
    yield _HEAD
    yield Rule(
        "re:",
        Scheme(
            layout=Layout.PLAIN,
            bits=8,
            is_float=True,
            group_size=columns,
            rows_per_scale=rows,
            activations="fp8",
        ),
    )


_METHODS = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": compressed_tensors_rules,
    "fp8": _fp8,
}


def _group_size(fields: Mapping[str, Any], key: str) -> int | None:
    """-1 stands for whole rows."""
    value = fields.get(key, 128)
    return None if value is None or value == -1 else integer({key: value}, key)


def _one_of(fields: Mapping[str, Any], key: str, known: tuple[int, ...], method: str) -> int:
    value = fields.get(key)
    if value not in known:
        raise UnsupportedModel(
            f"quantization_config: {method} with {key} = {value!r} is not supported; "
            f"known: {', '.join(map(str, known))}"
        )
    return int(value)
