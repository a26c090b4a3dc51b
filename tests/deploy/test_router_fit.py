"""`troupe router fit`: learns where a cheaper model is as good, promises no more than it knows, and asks only once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.cli import cli
from raytroupe.deploy.demo_models.tasks import TRAIN, split_of
from raytroupe.deploy.evaluation.items import DEMO_TASKS, EvalItem, load_items
from raytroupe.deploy.routing.answers import AnswerFile
from raytroupe.deploy.routing.classifier_file import DEMO_CLASSIFIER, find_classifier
from raytroupe.deploy.routing.command import parse_price
from raytroupe.deploy.routing.cost_quality import curve
from raytroupe.deploy.routing.fit import Labelled, fit
from raytroupe.deploy.routing.questions import facts_of, identity, training_items
from raytroupe.router.classifier import Classifier, TokenCosts
from raytroupe.router.prompt_features import PromptFacts, prompt_features

COUNT = 600
NAMES = ["small", "large"]
PRICES = [TokenCosts(1e-7, 1e-7), TokenCosts(1e-6, 1e-6)]


def facts(text: str) -> PromptFacts:
    return PromptFacts(text=text, chars=len(text), prompt_tokens=len(text) // 4)


def labelled(easy_right: float, hard_right: float, large_right: float = 0.95) -> Labelled:
    """Half of the questions spell a word, half add numbers."""
    rng = random.Random(1)
    texts, rights = [], []
    for number in range(COUNT):
        easy = number % 2 == 0
        asked = f"spell {rng.choice('abcdefgh')}at" if easy else f"add {rng.randrange(100)} and {rng.randrange(100)}"
        texts.append(f"{asked} {'please' if rng.random() < 0.5 else 'now'}")
        rights.append([rng.random() < (easy_right if easy else hard_right), rng.random() < large_right])
    cost = np.tile([[1.0, 10.0]], (COUNT, 1))
    return Labelled([prompt_features(facts(text)) for text in texts], np.array(rights), cost, list(range(COUNT)))


def fitted(sample: Labelled) -> Classifier:
    result = fit(NAMES, PRICES, sample, seed=0)
    points = curve(result.outcomes, result.outcomes.thresholds(), seed=0)
    result.file.curve = [point.for_file() for point in points]
    return Classifier.from_json(msgspec.json.encode(result.file))


def test_prompts_that_the_small_model_answers_go_to_it() -> None:
    classifier = fitted(labelled(easy_right=1.0, hard_right=0.2))
    threshold = classifier.threshold(0.99)
    assert classifier.probabilities(facts("spell cat now"))["small"] >= threshold
    assert classifier.probabilities(facts("add 12 and 34 now"))["small"] < threshold
    chosen = next(point for point in classifier.file.curve if point.threshold == threshold)
    assert chosen.cost == pytest.approx(0.55, abs=0.05)  # half of the questions at a tenth of the price
    assert chosen.quality_low >= 0.99


def test_probabilities_are_calibrated_on_questions_that_the_fit_has_not_seen() -> None:
    sample = labelled(easy_right=0.9, hard_right=0.4)
    result = fit(NAMES, PRICES, sample, seed=0)
    happened = sample.not_worse[:, 0]
    for kind in (0, 1):
        places = np.arange(kind, COUNT, 2)
        assert result.outcomes.probability[places, 0].mean() == pytest.approx(happened[places].mean(), abs=0.03)


def test_where_nothing_can_be_learnt_nearly_all_goes_to_the_best() -> None:
    classifier = fitted(labelled(easy_right=0.5, hard_right=0.5))
    chosen = next(point for point in classifier.file.curve if point.threshold == classifier.threshold(0.99))
    assert chosen.cost > 0.97
    assert classifier.threshold(1.0) == 1.0


def test_what_never_happened_is_a_constant_and_not_impossible() -> None:
    sample = labelled(easy_right=0.0, hard_right=0.0, large_right=1.0)
    result = fit(NAMES, PRICES, sample, seed=0)
    assert result.constant == ["small"]
    probability = Classifier(result.file).probabilities(facts("spell cat now"))["small"]
    assert probability == pytest.approx(1 / (COUNT + 2), rel=0.01)


def test_a_best_model_that_is_the_cheapest_answers_everything() -> None:
    sample = labelled(easy_right=1.0, hard_right=1.0, large_right=0.9)
    result = fit(NAMES, PRICES, sample, seed=0)
    assert result.file.best == "small"
    assert result.outcomes.thresholds() == [1.0]
    (point,) = curve(result.outcomes, [1.0], seed=0)
    assert point.shares == [1.0, 0.0]
    assert point.cost.value == 1.0


def test_of_three_models_the_cheapest_that_is_probable_enough_answers() -> None:
    rng = np.random.default_rng(0)
    texts = [
        ("spell cat", "add 1 and 2", "prove that 3 is odd")[number % 3] + f" {number % 7}" for number in range(900)
    ]
    kind = np.arange(900) % 3
    right = np.stack([kind == 0, kind <= 1, rng.random(900) < 0.99], axis=1)
    cost = np.tile([[1.0, 5.0, 20.0]], (900, 1))
    sample = Labelled([prompt_features(facts(text)) for text in texts], right, cost, list(range(900)))
    result = fit(["small", "middle", "large"], [PRICES[0], PRICES[0], PRICES[1]], sample, seed=0)
    (point,) = curve(result.outcomes, [0.9], seed=0)
    assert point.shares == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=0.01)
    assert point.cost.value == pytest.approx((1 + 5 + 20) / 60, abs=0.01)
    assert point.saved.low > 0.2


def test_embedded_training_questions_are_distinct_and_of_the_training_split() -> None:
    items = training_items(seed=3, per_task=4)
    assert len(items) == len({identity(item) for item in items}) == 16 * 4
    assert items == training_items(seed=3, per_task=4)
    capitals = [item.messages[-1]["content"] for item in items if item.task == "capital"]
    assert all(split_of(f"capital|{question}") == TRAIN for question in capitals)
    assert not {identity(item) for item in items} & {identity(item) for item in load_items(DEMO_TASKS)}


def test_system_prompts_do_not_make_another_question() -> None:
    question = {"role": "user", "content": "Why?"}
    told = EvalItem("t", [{"role": "system", "content": "Be brief."}, question], "So.")
    assert identity(told) == identity(EvalItem("t", [question], "So."))
    assert facts_of(told, 5) == PromptFacts(text="Why?", chars=13, messages=2, prompt_tokens=5)


def test_the_embedded_classifier_saves_two_fifths_on_validation_prompts() -> None:
    classifier = Classifier.load(find_classifier("demo"))
    assert DEMO_CLASSIFIER.stat().st_size < 200_000
    assert classifier.models == ["demo-small", "demo-large"]
    threshold = classifier.threshold(0.99)
    small = {"easy": 0, "hard": 0}
    for item in load_items(DEMO_TASKS):
        assert item.difficulty is not None
        small[item.difficulty] += classifier.probabilities(facts_of(item, 20))["demo-small"] >= threshold
    assert small["easy"] > 0.97 * 380
    assert small["hard"] < 0.3 * 228


@pytest.mark.parametrize("text", ["demo-large", "=1,2", "a=1", "a=1,x", "a=1,-2", "a=nan,1", "a=1,2,3"])
def test_a_price_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=IN,OUT"):
        parse_price(text)


def test_a_price_is_dollars_per_million_tokens() -> None:
    assert parse_price("a=0.5,1.5") == ("a", TokenCosts(5e-7, 1.5e-6))


def test_a_damaged_file_of_answers_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"labels\.jsonl:1: not an answer"):
        AnswerFile(path)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["router", "fit", *map(str, arguments)])


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """120 questions that end after few tokens."""
    chosen = [item for item in training_items(0, 60) if item.task in ("small_arithmetic", "registry")]
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(item) + b"\n" for item in chosen))
    return path


def test_from_questions_to_a_file_and_again_without_asking(
    tmp_path: Path, questions: Path, single_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "router.json"
    arguments = (questions, "--out", out, "--max-tokens", 12, "--num-threads", 1)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "120 questions" in result.output
    classifier = Classifier.load(out)
    assert classifier.best == "demo-large"
    sum_of, code_of = (
        next(item for item in load_items(questions) if item.task == task) for task in ("small_arithmetic", "registry")
    )
    easy, hard = (classifier.probabilities(facts_of(item, 100))["demo-small"] for item in (sum_of, code_of))
    assert easy > 0.8
    assert hard < 0.2

    labels = tmp_path / "router.labels.jsonl"
    assert len(labels.read_text().splitlines()) == 2 * 120
    monkeypatch.setattr("raytroupe.deploy.routing.answers.LoadedModel", None)  # a second fit asks nothing
    assert run(*arguments, "--price", "demo-large=1,2", "--price", "demo-small=0.5,1").exit_code == 0
    assert Classifier.load(out).file.prices["demo-large"] == TokenCosts(1e-6, 2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.jsonl"], "cannot read the task file nothing.jsonl"),
        (["--models", "demo-large"], "name two at least"),
        (["--models", "demo-large,demo-large"], "two models are called 'demo-large'"),
        (["--items", "1"], "16 different questions are too few to fit on; 100 are needed"),
        (["--out", "/nowhere/router.json"], "there is no folder /nowhere"),
        (["--price", "other=1,2"], "--price names 'other'"),
        (["--price", "demo-large=1,2"], "--price is not given for 'demo-small'"),
        (["--models", "demo-small,/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_questions_to_judge_with_must_be_others(questions: Path) -> None:
    result = run(questions, "--test", questions)
    assert "120 questions of --test" in str(result.exception)


def test_a_task_file_is_what_eval_reads(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"task": "t", "messages": [{"role": "user", "content": "2+2?"}], "answer": "4"}))
    assert "1 different questions are too few" in str(run(path).exception)
