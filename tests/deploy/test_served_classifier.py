"""A classifier is read, and held against the served models, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytroupe.cluster.errors import ConfigError
from raytroupe.cluster.router_config import RouterConfig
from raytroupe.deploy.routing.classifier_file import read_classifier
from raytroupe.router.classifier import Classifier


def test_the_embedded_models_classifier_goes_by_the_name_of_demo() -> None:
    content = read_classifier(RouterConfig(classifier="demo"), ["demo-large", "demo-small"])
    assert content is not None
    assert Classifier.from_json(content).best == "demo-large"
    assert read_classifier(RouterConfig(), ["demo-large"]) is None


def test_a_classifier_of_other_models_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fitted for .*demo-large.* and served are chat"):
        read_classifier(RouterConfig(classifier="demo"), ["chat"])


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        read_classifier(RouterConfig(classifier=str(tmp_path / "nowhere.json")), ["chat"])
