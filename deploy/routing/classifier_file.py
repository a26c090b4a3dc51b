"""The file that `classifier` in a configuration means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...cluster.errors import ConfigError
from ...cluster.router_config import RouterConfig
from ...router.classifier import Classifier

DEMO = "demo"
"""In a configuration: the classifier of the embedded models."""
DEMO_CLASSIFIER = Path(__file__).parents[1] / "demo_models" / "router.json"


def find_classifier(name: str) -> Path:
    """The file of a classifier: a path, or `DEMO` where no file has that name."""
    path = Path(name).expanduser()
    return DEMO_CLASSIFIER if name == DEMO and not path.exists() else path


def read_classifier(config: RouterConfig, served: Sequence[str]) -> bytes | None:
    """The content of the fitted classifier's file, if one is configured; `demo` is that of the embedded models.

    Raises:
        ConfigError: it cannot be read, is none, or knows none of the models that are `served`.
    """
    if config.classifier is None:
        return None
    path = find_classifier(config.classifier)
    known = Classifier.load(path).models
    if not set(known) & set(served):
        raise ConfigError(
            f"router.classifier = {config.classifier!r}: it was fitted for {', '.join(known)}, and served are "
            f"{', '.join(served)}; fit one with --models NAME=MODEL, or name the models as it does"
        )
    return path.read_bytes()
