"""What routing by complexity costs a request: features of the prompt and probabilities of the models.

    python -m raytroupe.deploy.bench.classifier

Wall-clock time, and the thread's CPU time, which leaves out what other processes took meanwhile (reading that clock
costs about a microsecond of it). With the classifier of the embedded models, on their validation questions and on two
long prompts: prose of 20,000 characters, and one with as many words as there can be within what is looked at.
"""

from __future__ import annotations

import gc
import itertools
import time
from pathlib import Path
from typing import Annotated

import typer

from ...router.classifier import Classifier
from ...router.prompt_features import PromptFacts
from ..evaluation.items import DEMO_TASKS, load_items
from ..routing.classifier_file import DEMO_CLASSIFIER
from ..routing.questions import facts_of
from .options import JsonFile
from .report import Column, Report, percentile, publish, run_as_program

LIMIT_US = 100
"""The project's aim for a prompt."""

COLUMNS = [
    Column("prompts", "prompts"),
    Column("calls", "calls", "d"),
    Column("median_us", "median µs", ".1f"),
    Column("p99_us", "p99 µs", ".1f"),
    Column("cpu_p99_us", "p99 CPU µs", ".1f"),
    Column("of_limit", f"p99 / {LIMIT_US} µs", ".2f"),
]


def main(
    file: Annotated[Path, typer.Argument(help="Classifier.")] = DEMO_CLASSIFIER,
    calls: Annotated[int, typer.Option(min=100, help="Measured calls for each kind of prompt.")] = 20_000,
    json_file: JsonFile = None,
) -> None:
    """Measure Classifier.probabilities()."""
    classifier = Classifier.load(file)
    questions = [facts_of(item, prompt_tokens=40) for item in load_items(DEMO_TASKS)]
    prose = "What is the plural of mouse, and how do you spell it? " * 400
    dense = "1+a-" * 5000
    kinds = {
        "validation questions": questions,
        "prose, 20,000 characters": [PromptFacts(text=prose, chars=len(prose), prompt_tokens=200)],
        "a word per character, 20,000 characters": [PromptFacts(text=dense, chars=200, prompt_tokens=200)],
    }
    rows = [{"prompts": name, **measure(classifier, prompts, calls)} for name, prompts in kinds.items()]
    publish(Report("classifier", {"file": file.name}, COLUMNS, rows), json_file)


def measure(classifier: Classifier, prompts: list[PromptFacts], calls: int) -> dict[str, float]:
    """Time single calls, in turn over the prompts, without the garbage collector."""
    micros, cpu_micros = [], []
    gc.collect()
    gc.disable()
    try:
        for facts in itertools.islice(itertools.cycle(prompts), calls):
            begin = time.perf_counter()
            classifier.probabilities(facts)
            micros.append((time.perf_counter() - begin) * 1e6)
            begin = time.thread_time()
            classifier.probabilities(facts)
            cpu_micros.append((time.thread_time() - begin) * 1e6)
    finally:
        gc.enable()
    p99 = percentile(micros, 0.99)
    return {
        "calls": calls,
        "median_us": percentile(micros, 0.5),
        "p99_us": p99,
        "cpu_p99_us": percentile(cpu_micros, 0.99),
        "of_limit": p99 / LIMIT_US,
    }


if __name__ == "__main__":
    run_as_program(main)
