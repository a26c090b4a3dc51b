"""Errors on the way up become one line."""

from __future__ import annotations

import pytest

from raytroupe.cluster.errors import CheckpointError, EngineError
from raytroupe.deploy.serving import failing_as


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Traceback (most recent call last):\n  File x\nValueError: no such port\n"),
            "ValueError: no such port",
        ),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_an_error_of_a_library_is_an_engine_error_with_its_cause(error: Exception, said: str) -> None:
    with pytest.raises(EngineError) as raised, failing_as("Ray Serve does not start"):
        raise error
    assert str(raised.value) == f"Ray Serve does not start: {said}"
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [CheckpointError("model.safetensors is gone"), KeyboardInterrupt()])
def test_our_own_errors_and_interrupts_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, failing_as("Ray Serve does not start"):
        raise error
    assert raised.value is error
