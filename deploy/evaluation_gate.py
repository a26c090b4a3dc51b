"""No variant of a model is served that nobody has evaluated, or that was found wanting.

A variant is a model with quantised weights or an 8-bit KV cache. What it has lost is measured by `troupe eval`, whose
report lies beside the weights (`cluster/evaluation_report.py`).
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..actors.placement import Device
from ..cluster.checkpoint_hash import hash_checkpoint
from ..cluster.config import ModelConfig
from ..cluster.errors import CheckpointError, ConfigError
from ..cluster.evaluation_report import REPORT_FILE, Verdict, read_report
from ..cluster.model_spec import ModelSpec

_WAY_OUT = "or serve it all the same with --allow-unevaluated (allow_unevaluated: true)"


def check_evaluated(model: ModelConfig, spec: ModelSpec, folder: Path, device: Device) -> None:
    """
    Args:
        device: that it is to be served on, whose kernels round in their own way.

    Raises:
        ConfigError: the model is a variant without a passed evaluation of the files that lie there now, on such a
            device, against a base that is no variant itself, by limits as strict as the defaults.
    """
    kv_cache_dtype = model.kv_cache_dtype
    changes = [] if spec.quantisation is None else [f"its weights are quantised ({spec.quantisation.label})"]
    if kv_cache_dtype != "auto":
        changes.append(f"kv_cache_dtype = {kv_cache_dtype}")
    if not changes or model.allow_unevaluated or model.load_format == "dummy":
        return

    base = model.model if spec.quantisation is None else "BASE"
    command = f"troupe eval {shlex.quote(model.model)} --against {shlex.quote(base)}"
    if kv_cache_dtype != "auto":
        command += f" --kv-cache-dtype {kv_cache_dtype}"
    refused = f"{model.name} is refused: {' and '.join(changes)}, and"
    remedy = f"run `{command}`, {_WAY_OUT}"
    try:
        report = read_report(folder / REPORT_FILE)
    except CheckpointError as error:
        raise ConfigError(f"{refused} {error}; {remedy}") from None
    evaluation = report.evaluations.get(kv_cache_dtype) if report is not None else None
    if evaluation is None:
        raise ConfigError(f"{refused} it was never evaluated like that; {remedy}")
    evaluated = evaluation.variant.content
    content = hash_checkpoint(folder, evaluated.files)
    if content.sha256 != evaluated.sha256:
        before, now = ({(file.name, file.sha256) for file in of.files} for of in (evaluated, content))
        changed = ", ".join(sorted({name for name, _ in before ^ now}))
        raise ConfigError(f"{refused} its files have changed since it was evaluated ({changed}); {remedy}")
    base_evaluated = evaluation.base
    if base_evaluated.quantisation is not None or base_evaluated.kv_cache_dtype != "auto":
        raise ConfigError(f"{refused} it was only compared with {base_evaluated.model}, itself a variant; {remedy}")
    if evaluation.variant.device != device:
        raise ConfigError(
            f"{refused} it was evaluated on {evaluation.variant.device} and is to be served on {device}; run "
            f"`{command} --device {device}`, {_WAY_OUT}"
        )
    if evaluation.verdict is Verdict.FAIL:
        raise ConfigError(f"{refused} it failed its evaluation: {'; '.join(evaluation.reasons)} ({_WAY_OUT})")
    if evaluation.verdict is Verdict.UNDECIDED:
        raise ConfigError(
            f"{refused} its evaluation left undecided whether it is good enough: {'; '.join(evaluation.reasons)} "
            f"({_WAY_OUT})"
        )
    if laxer := evaluation.limits.laxer_than_default:
        raise ConfigError(f"{refused} its evaluation was laxer than the defaults: {', '.join(laxer)}; {remedy}")
