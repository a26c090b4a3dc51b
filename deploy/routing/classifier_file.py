"""Which file `classifier` in a configuration means."""

from __future__ import annotations

from pathlib import Path

DEMO = "demo"
"""In a configuration: the classifier of the embedded models."""
DEMO_CLASSIFIER = Path(__file__).parents[1] / "demo_models" / "router.json"


def find_classifier(name: str) -> Path:
    """The file of a classifier: a path, or `DEMO` where no file has that name."""
    path = Path(name).expanduser()
    return DEMO_CLASSIFIER if name == DEMO and not path.exists() else path
