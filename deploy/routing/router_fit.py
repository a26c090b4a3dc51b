"""The whole of `troupe router fit`: ask, label, fit, judge, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import Progress

from ...cluster.errors import ConfigError
from ...cluster.price import TokenPrices, estimated_prices
from ...router.classifier import Classifier, TokenCosts
from ...router.prompt_features import PromptFacts, prompt_features
from ..bench.report import environment
from ..evaluation.held_out_text import knows_embedded_tasks
from ..evaluation.items import DEMO_TASKS, EvalItem, load_items, right
from .answers import Answer, AnswerFile, Variant, check_names
from .cost_quality import Outcomes, RoutePoint, calibration, curve
from .fit import MIN_QUESTIONS, Fit, Labelled, fit
from .questions import facts_of, identity, training_items
from .tables import curve_table, model_table, some_points


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What a user may choose."""

    models: list[str]
    data: Path | None
    items: int
    test: Path | None
    quality: float
    out: Path
    labels: Path
    prices: dict[str, TokenCosts]
    seed: int
    max_tokens: int
    concurrency: int
    engine: dict[str, Any]


def router_fit(options: FitOptions, console: Console) -> Classifier:
    """Fit on the questions, print what came of it, and write the file.

    Raises:
        ConfigError: files, questions or models do not go together. CheckpointError: a model cannot be loaded.
    """
    if len(options.models) < 2:
        raise ConfigError(f"--models names {len(options.models)} model; name two at least, to choose between")
    variants = [
        Variant(model, max_tokens=options.max_tokens, concurrency=options.concurrency, engine=options.engine)
        for model in options.models
    ]
    check_names(variants)
    names = [variant.name for variant in variants]
    if unknown := sorted(set(options.prices) - set(names)):
        raise ConfigError(f"--price names {unknown[0]!r}; the models are {', '.join(names)}")
    if options.prices and (missing := [name for name in names if name not in options.prices]):
        raise ConfigError(f"--price is not given for {missing[0]!r}; estimates and prices do not compare, so give all")
    items, test = _questions(options, variants)
    distinct = len({identity(item) for item in items})
    if distinct < MIN_QUESTIONS:
        raise ConfigError(f"{distinct} different questions are too few to fit on; {MIN_QUESTIONS} are needed at least")

    known = AnswerFile(options.labels)
    asked = _ask(variants, [*items, *test], known, console)
    prices = [options.prices.get(variant.name) or _estimate(variant) for variant in variants]
    cost = _costs(asked, prices)[: len(items)].mean(axis=0)
    order = [int(place) for place in np.argsort(cost, kind="stable")]
    names = [names[place] for place in order]
    prices = [prices[place] for place in order]
    asked = [asked[place] for place in order]
    labelled = _label(items, [answers[: len(items)] for answers in asked], prices)
    fitted = fit(names, prices, labelled, options.seed)

    points = curve(fitted.outcomes, fitted.outcomes.thresholds(), options.seed)
    fitted.file.curve = [point.for_file() for point in points]
    fitted.file.about = _about(options, len(items))
    content = msgspec.json.encode(fitted.file) + b"\n"
    classifier = Classifier.from_json(content, str(options.out))
    threshold = classifier.threshold(options.quality)

    _print_fit(console, names, prices, fitted, points, threshold)
    if test:
        judged = _label(test, [answers[len(items) :] for answers in asked], prices)
        _print_test(console, classifier, test, [answers[len(items) :] for answers in asked], judged, threshold, options)
    _print_choice(console, fitted, points, threshold, options.quality)
    try:
        options.out.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"--out {options.out} cannot be written: {error.strerror}") from None
    console.print(f"written to {options.out}", markup=False, highlight=False, soft_wrap=True)
    return classifier


def _questions(options: FitOptions, variants: Sequence[Variant]) -> tuple[list[EvalItem], list[EvalItem]]:
    """To fit on, and to judge with; none of the latter may be among the former."""
    test = load_items(options.test) if options.test is not None else []
    if options.data is not None:
        items = load_items(options.data)
    else:
        if strange := [variant for variant in variants if not knows_embedded_tasks(variant.folder)]:
            raise ConfigError(
                f"{strange[0].name} is none of the embedded models, so DATA must be given: JSON lines of questions "
                "with task, messages and answer"
            )
        items = training_items(options.seed, options.items)
        test = test or load_items(DEMO_TASKS)
    fitted_on = {identity(item) for item in items}
    if repeated := sum(identity(item) in fitted_on for item in test):
        raise ConfigError(
            f"{repeated} questions of --test {options.test} are among those to fit on, so that they would say nothing "
            "about others; remove them from one of the two"
        )
    return items, test


def _ask(
    variants: Sequence[Variant], items: Sequence[EvalItem], known: AnswerFile, console: Console
) -> list[list[Answer]]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        answers = []
        for variant in variants:
            task = progress.add_task(variant.name, total=len(items))
            answers.append(
                variant.answers(items, known, lambda done, task=task: progress.update(task, completed=done))  # type: ignore[misc]
            )
            progress.update(task, completed=len(items))
    return answers


def _estimate(variant: Variant) -> TokenCosts:
    prices: TokenPrices = estimated_prices(variant.spec, 4 if variant.spec.dtype == "float32" else 2)
    return TokenCosts(prices.prompt, prices.output, estimated=True)


def _costs(answers: Sequence[Sequence[Answer]], prices: Sequence[TokenCosts]) -> np.ndarray:
    """Dollars [questions, models]."""
    return np.array(
        [
            [answer.prompt_tokens * price.prompt + answer.output_tokens * price.output for answer in of_model]
            for of_model, price in zip(answers, prices, strict=True)
        ]
    ).T


def _label(items: Sequence[EvalItem], answers: Sequence[Sequence[Answer]], prices: Sequence[TokenCosts]) -> Labelled:
    is_right = np.array([right(items, [answer.reply for answer in of_model]) for of_model in answers]).T
    facts = _facts(items, answers, int(is_right.sum(axis=0).argmax()))
    return Labelled(
        features=[prompt_features(of_item) for of_item in facts],
        right=is_right,
        cost=_costs(answers, prices),
        groups=[identity(item) for item in items],
    )


def _facts(items: Sequence[EvalItem], answers: Sequence[Sequence[Answer]], best: int) -> list[PromptFacts]:
    """Tokens of prompts are counted as the best model counts them."""
    return [facts_of(item, answer.prompt_tokens) for item, answer in zip(items, answers[best], strict=True)]


def _about(options: FitOptions, items: int) -> dict[str, str]:
    of_environment = environment()
    return {
        "questions": f"{items} of "
        + (options.data.name if options.data else f"the embedded models' training split, seed {options.seed}"),
        "seed": str(options.seed),
        **{key: str(of_environment[key]) for key in ("troupe", "date")},
    }


def _print_fit(
    console: Console,
    names: Sequence[str],
    prices: Sequence[TokenCosts],
    fitted: Fit,
    points: Sequence[RoutePoint],
    threshold: float,
) -> None:
    outcomes = fitted.outcomes
    fits = {
        name: calibration(
            outcomes.probability[:, column], outcomes.right[:, column] | ~outcomes.right[:, outcomes.best]
        )
        for column, name in enumerate(names)
        if column != outcomes.best
    }
    console.print(model_table(names, outcomes, prices, fits))
    for name in fitted.constant:
        console.print(
            f"{name}: its answers are nearly {'always' if fitted.file.models[name].intercept > 0 else 'never'} as good "
            "as the best model's, so there is nothing to learn from the prompts; its probability is constant",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    shown = some_points(points, threshold)
    console.print(curve_table("cost and quality of each threshold, every question unseen", names, shown, threshold))


def _print_test(
    console: Console,
    classifier: Classifier,
    test: Sequence[EvalItem],
    answers: Sequence[Sequence[Answer]],
    judged: Labelled,
    threshold: float,
    options: FitOptions,
) -> None:
    names = classifier.models
    best = names.index(classifier.best)
    predicted = [classifier.probabilities(facts) for facts in _facts(test, answers, best)]
    probability = np.array([[of_item[name] for name in names] for of_item in predicted])
    outcomes = Outcomes(judged.right, judged.cost, probability, best, judged.groups)
    point = curve(outcomes, [threshold], options.seed)
    name = options.test.name if options.test is not None else DEMO_TASKS.name
    right_of = ", ".join(f"{model} {share:.2%}" for model, share in zip(names, judged.right.mean(axis=0), strict=True))
    console.print(curve_table(f"{len(test)} test questions, {name}; right: {right_of}", names, point, threshold))


def _print_choice(
    console: Console, fitted: Fit, points: Sequence[RoutePoint], threshold: float, quality: float
) -> None:
    point = next((point for point in points if point.threshold == threshold), None)
    best = fitted.file.best
    if fitted.outcomes.best == 0:
        text = f"{best} is the best model and the cheapest, so there is nothing to route: it answers everything"
    elif point is not None and point.cost.value < 1:
        text = (
            f"--quality {quality:g}: a cheaper model may answer from a probability of {threshold:.4f} on, which saves "
            f"{1 - point.cost.value:.1%} of the cost and keeps {point.quality.value:.2%} of {best}'s right answers "
            f"(95 % interval from {point.quality.low:.2%})"
        )
    else:
        reached = max((point for point in points if point.cost.value < 1), key=lambda p: p.quality.low, default=None)
        why = (
            f"the 95 % interval of no threshold that saves anything begins above {reached.quality.low:.2%}"
            if reached is not None
            else "no threshold saves anything"
        )
        text = f"--quality {quality:g}: only {best} may answer, since {why}; with more questions intervals are narrower"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
