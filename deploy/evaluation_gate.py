"""No variant of a model is served that nobody has evaluated, or that was found wanting.

A variant is a model with quantised weights or an 8-bit KV cache. What it has lost is measured by `troupe eval`, whose
report lies beside the weights (`cluster/evaluation_report.py`).
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..cluster.checkpoint_hash import hash_checkpoint
from ..cluster.config import ModelConfig
from ..cluster.errors import CheckpointError, ConfigError
from ..cluster.evaluation_report import REPORT_FILE, Verdict, read_report
from ..cluster.model_spec import ModelSpec

_WAY_OUT = "or serve it all the same with --allow-unevaluated (allow_unevaluated: true)"


def check_evaluated(model: ModelConfig, spec: ModelSpec, folder: Path) -> None:
    """
    Raises:
        ConfigError: the model is a variant without a passed evaluation of the weights that lie there now.
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
    if hash_checkpoint(folder, evaluated.files).sha256 != evaluated.sha256:
        raise ConfigError(f"{refused} its files have changed since it was evaluated; {remedy}")
    if evaluation.verdict is Verdict.FAIL:
        raise ConfigError(f"{refused} it failed its evaluation: {'; '.join(evaluation.reasons)} ({_WAY_OUT})")
    if evaluation.verdict is Verdict.UNDECIDED:
        raise ConfigError(
            f"{refused} its evaluation left undecided whether it is good enough: {'; '.join(evaluation.reasons)} "
            f"({_WAY_OUT})"
        )
