"""What `troupe eval` found out about a variant of a model: read by `troupe serve`, which refuses what was not found
good enough, and by whoever chooses a variant for a task.

The report is a file beside the weights. It has one evaluation per type of the KV cache, since that changes answers too.
"""

from __future__ import annotations

import enum
from pathlib import Path

import msgspec

from .checkpoint_hash import CheckpointHash
from .errors import CheckpointError

REPORT_FILE = "troupe_eval.json"
FORMAT = 1
"""Version of the file's form."""


class Verdict(enum.StrEnum):
    """What follows from a comparison with limits."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"
    """Too few samples to tell."""
    BEYOND = "beyond base"
    """Of a task: the base itself answers so little of it that a variant could lose nothing, whatever it does."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a variant may lose."""

    max_loss: float = 1.0
    """Points of accuracy in any one task, beside the statistical margin."""
    max_margin: float = 5.0
    """Points that the loss may exceed `max_loss` by for all that the sample can tell; beyond there is no pass."""
    max_perplexity_increase: float = 3.0
    """Per cent."""

    @property
    def laxer_than_default(self) -> list[str]:
        """Those that allow more than the defaults do, as `troupe eval` is told them."""
        return [
            f"--{name.replace('_', '-')} {getattr(self, name):g} (default {getattr(_DEFAULT_LIMITS, name):g})"
            for name in self.__struct_fields__
            if getattr(self, name) > getattr(_DEFAULT_LIMITS, name)
        ]


_DEFAULT_LIMITS = Limits()


class TaskFigures(msgspec.Struct, kw_only=True):
    """Exact match on one task, both models with the same questions. Accuracies are shares, losses points: per cent of
    the questions."""

    items: int
    base_right: int
    right: int
    lost: int
    """Right by the base only."""
    gained: int
    """Right by the variant only."""
    base_accuracy: float
    accuracy: float
    loss: float
    """Accuracy that was lost; negative where the variant is better."""
    low: float
    high: float
    """95 % interval of the loss."""
    certain_loss: float
    """What was lost at least, with the confidence that all criteria of the verdict share."""
    verdict: Verdict
    items_needed: int = 0
    """More questions until there would be a verdict, if they went like these; 0 with one, and where the base itself
    answers too few right."""


class TextFigures(msgspec.Struct, kw_only=True):
    """Both models on the same held-out text. Losses are natural logarithms, per token that is scored."""

    sequences: int
    tokens: int
    base_perplexity: float
    perplexity: float
    ratio: float
    low: float
    high: float
    """95 % interval of the ratio."""
    certain_ratio: float
    """What it is at least, with the confidence that all criteria of the verdict share."""
    kl_divergence: float
    """Mean of KL(base || variant)."""
    kl_low: float
    kl_high: float
    """95 % interval of the mean."""
    top1_agreement: float
    """Share of tokens for which both have the same likeliest one."""
    verdict: Verdict
    sequences_needed: int = 0
    """More sequences until there would be a verdict, if they went like these; 0 with one."""


class ModelFigures(msgspec.Struct, kw_only=True):
    """What one of the two models is and takes."""

    model: str
    """Name of the folder."""
    content: CheckpointHash
    quantisation: str | None
    kv_cache_dtype: str
    device: str
    """"cpu" or "cuda"."""
    dtype: str
    """Of activations, and of weights that are not quantised."""
    weight_bytes: int
    """In the device's memory."""
    tokens_per_second: dict[str, float]
    """Of decoding, by the number of requests that run at once."""
    json_items: int
    """Questions whose answer is a JSON object or array."""
    json_valid: int
    """Replies to them that are."""
    cut_replies: int
    """Replies that ended only because they were as long as was allowed."""


class Evaluation(msgspec.Struct, kw_only=True):
    """One comparison of a variant with its base."""

    verdict: Verdict
    reasons: list[str]
    """Why it is not a pass, one line per criterion."""
    limits: Limits
    variant: ModelFigures
    base: ModelFigures
    tasks: dict[str, TaskFigures]
    total: TaskFigures
    """All questions together; of its verdict only a fail counts: then some task has lost too much, whichever it is."""
    text: TextFigures
    sources: dict[str, str]
    """Where questions and text came from, and how replies were made."""
    environment: dict[str, str]
    """Versions, machine and date."""


class EvaluationReport(msgspec.Struct, kw_only=True):
    """The file."""

    format: int = FORMAT
    evaluations: dict[str, Evaluation] = {}
    """By type of the KV cache, as `kv_cache_dtype` says it."""


def read_report(path: Path) -> EvaluationReport | None:
    """The report at `path`; None without one.

    Raises:
        CheckpointError: the file is no report that this version understands.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        report = msgspec.json.decode(content, type=EvaluationReport)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is no evaluation report: {error}; remove it and evaluate again") from None
    if report.format != FORMAT:
        raise CheckpointError(f"{path} has format {report.format}, and {FORMAT} is known; evaluate again")
    return report


def check_writable(path: Path) -> None:
    """Find out whether a file can be written, before the measurements that it is for.

    Raises:
        CheckpointError: it cannot.
    """
    scratch = _scratch(path)
    try:
        scratch.touch()
        scratch.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def write_report(path: Path, report: EvaluationReport) -> None:
    """Write a report, at once or not at all.

    Raises:
        CheckpointError: it cannot be written there.
    """
    scratch = _scratch(path)
    try:
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        scratch.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None


def _scratch(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written: {error.strerror}; name a file in a folder that can be written. `troupe serve` "
        f"looks for {REPORT_FILE} beside the weights only: if that folder is read-only, evaluate and serve a copy of it"
    )
