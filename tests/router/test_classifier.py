"""The classifier that serves: what it answers, and that a bad file is refused before a request comes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from raytroupe.cluster.errors import ConfigError
from raytroupe.router.classifier import (
    ALMOST,
    Classifier,
    ClassifierFile,
    CurvePoint,
    ModelWeights,
    TokenCosts,
    sigmoid,
)
from raytroupe.router.prompt_features import COUNTS, SIZES, VERSION, PromptFacts, prompt_features


def facts(text: str, **fields: Any) -> PromptFacts:
    return PromptFacts(**{"text": text, "chars": len(text), "prompt_tokens": 10, **fields})


def point(threshold: float, quality: float, low: float, cost: float) -> CurvePoint:
    return CurvePoint(threshold=threshold, quality=quality, quality_low=low, cost=cost)


def a_file(**fields: Any) -> ClassifierFile:
    """Knows the words of "add 12": with them the small model's log odds are 1, and 2 more for each digit."""
    vocabulary = sorted(prompt_features(facts("add 12")).phrases)
    digits = [2.0 / 1.0986122886681098 if name == "digits" else 0.0 for name in COUNTS]  # log(1 + 2) for two digits
    small = ModelWeights(intercept=-1.0, counts=digits, phrases=[0.0] * len(vocabulary))
    values = {
        "features": VERSION,
        "best": "large",
        "accuracy": {"small": 0.5, "large": 0.9},
        "prices": {"small": TokenCosts(1e-7, 2e-7), "large": TokenCosts(1e-6, 2e-6)},
        "vocabulary": vocabulary,
        "models": {"small": small},
        "largest": [6.0] * len(SIZES),
        "known": 0.5,
        "curve": [point(0.2, 0.8, 0.7, 0.3), point(0.5, 0.995, 0.991, 0.6), point(0.9, 1.0, 0.999, 0.8)],
        **fields,
    }
    return ClassifierFile(**values)


def test_log_odds_are_the_sum_of_the_weights() -> None:
    assert Classifier(a_file()).probabilities(facts("add 12")) == {
        "small": pytest.approx(sigmoid(-1 + 2)),
        "large": 1.0,
    }


def test_phrases_count_once_however_often_they_stand_there() -> None:
    file = a_file(known=0.0)
    file.models["small"].phrases = [0.5] * len(file.vocabulary)
    file.models["small"].counts = [0.0] * len(COUNTS)
    known = len(set(prompt_features(facts("add add 12 12")).phrases) & set(file.vocabulary))
    odds = -1 + 0.5 * known
    assert Classifier(file).probabilities(facts("add add 12 12"))["small"] == pytest.approx(sigmoid(odds))


@pytest.mark.parametrize(
    "strange",
    [
        facts("add 12", tools=True),
        facts("add 12", json_schema=True),
        facts("add 12", prompt_tokens=5000),
        facts("add 12", messages=1000),
        facts("Why is the sky blue, and since when?"),
        facts(""),
    ],
)
def test_of_what_is_unfamiliar_only_the_best_is_sure(strange: PromptFacts) -> None:
    assert Classifier(a_file()).probabilities(strange) == {"small": 0.0, "large": 1.0}


def test_a_cheaper_model_is_never_certain() -> None:
    file = a_file()
    file.models["small"].intercept = 1e6
    assert Classifier(file).probabilities(facts("add 12"))["small"] == ALMOST


@pytest.mark.parametrize(("quality", "threshold"), [(0.5, 0.2), (0.99, 0.5), (0.995, 0.9), (1.0, 1.0)])
def test_threshold_is_of_the_cheapest_point_that_certainly_is_good_enough(quality: float, threshold: float) -> None:
    assert Classifier(a_file()).threshold(quality) == threshold


def test_a_file_survives_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "router.json"
    path.write_bytes(msgspec.json.encode(a_file()))
    classifier = Classifier.load(path)
    assert msgspec.json.encode(classifier.file) == path.read_bytes()
    assert classifier.models == ["small", "large"]
    assert classifier.best == "large"


def _set(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set(features=VERSION + 1), "features of version"),
        (_set(best="huge"), "'huge' is none of small, large"),
        (_set(models={}), "do not name the same models"),
        (_set(vocabulary=[1]), "weights of phrases for 1 phrases"),
        (lambda data: data["vocabulary"].__setitem__(0, data["vocabulary"][1]), "twice"),
        (lambda data: data["vocabulary"].__setitem__(0, -1), "32 bits"),
        (_set(largest=[1.0]), "largest has 1 numbers"),
        (lambda data: data["models"]["small"]["counts"].pop(), "weights of counts"),
        (lambda data: data["curve"][0].update(threshold=1.5), "no probability"),
        (lambda data: data["prices"]["small"].update(prompt=-1.0), "price"),
        (lambda data: data["models"]["small"].update(intercept=None), "no classifier"),
        (_set(unknown=1), "no classifier"),
        (lambda data: data.pop("curve"), "no classifier"),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    data = msgspec.json.decode(msgspec.json.encode(a_file()))
    damage(data)
    with pytest.raises(ConfigError, match=message) as error:
        Classifier.from_json(msgspec.json.encode(data), "router.json")
    assert "router.json" in str(error.value)
    assert "troupe router fit" in str(error.value)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999"])
def test_numbers_must_be_finite(number: bytes) -> None:
    content = msgspec.json.encode(a_file()).replace(b'"intercept":-1.0', b'"intercept":' + number)
    with pytest.raises(ConfigError, match="no classifier"):
        Classifier.from_json(content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json cannot be read: No such file"):
        Classifier.load(tmp_path / "nothing.json")


def test_serving_needs_no_scikit_learn() -> None:
    program = "import sys, raytroupe.router.classifier, raytroupe.router.rules\nprint(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in output.stdout.split()}
    assert loaded.isdisjoint({"sklearn", "scipy", "numpy", "torch"})
    source = Path(sys.modules["raytroupe.router.classifier"].__file__ or "").read_text()
    imported = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)}
    assert not [statement for statement in imported if "sklearn" in statement or "pickle" in statement]
